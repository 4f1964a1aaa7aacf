# Given as CMAKE_PROJECT_INCLUDE when ROS 2 comes from Python wheels. Their CMake targets name include folders of the machine
# that built them, and CMake refuses an imported target with a folder that does not exist: at the end of the configure step,
# keep of each target only the folders that are here. A ROS 2 installation needs none of this.
function(keep_existing_include_folders)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(NOT folders)
      continue()
    endif()
    set(kept "")
    foreach(folder IN LISTS folders)
      if(folder MATCHES "^\\$<" OR EXISTS "${folder}")
        list(APPEND kept "${folder}")
      endif()
    endforeach()
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${kept}")
  endforeach()
endfunction()

cmake_language(DEFER CALL keep_existing_include_folders)
