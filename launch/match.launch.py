"""Start match_node on two image topics.

ros2 launch matchanything_ros match.launch.py image0:=/thermal/image_raw image1:=/rgb/image_raw
ros2 launch matchanything_ros match.launch.py --show-args
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

PARAMETERS = PathJoinSubstitution([FindPackageShare("matchanything_ros"), "config", "match.yaml"])
# Empty: as the parameters file says. Only what is given overrides the file.
OVERRIDES = {
    "bundle": (str, "a bundle's .onnx file, or the name of a packaged one"),
    "backend": (str, "auto, tensorrt, onnxruntime, onnxruntime-cuda or onnxruntime-cpu"),
    "image_transport": (str, "raw or compressed"),
    "image_qos": (str, "auto, sensor_data or reliable"),
    "use_sim_time": (bool, "true: follow /clock, as with 'ros2 bag play --clock'"),
}


def start(context):
    """The node, with those overrides that were given."""
    overrides = {
        # Typed, because launch would read a string such as 12 as a number.
        name: ParameterValue(LaunchConfiguration(name), value_type=kind)
        for name, (kind, _) in OVERRIDES.items()
        if LaunchConfiguration(name).perform(context)
    }
    return [
        Node(
            package="matchanything_ros",
            executable="match_node",
            name="match_node",
            namespace=LaunchConfiguration("namespace"),
            parameters=[LaunchConfiguration("parameters"), *([overrides] if overrides else [])],
            remappings=[(name, LaunchConfiguration(name)) for name in ("image0", "image1")],
            arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
            output="screen",
        )
    ]


def generate_launch_description():
    """Arguments, then the node."""
    return LaunchDescription(
        [
            DeclareLaunchArgument("image0", default_value="image0", description="topic of the first camera"),
            DeclareLaunchArgument("image1", default_value="image1", description="topic of the second camera"),
            DeclareLaunchArgument("parameters", default_value=PARAMETERS, description="parameters file"),
            DeclareLaunchArgument("namespace", default_value="", description="namespace of the node"),
            DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
            *(
                DeclareLaunchArgument(name, default_value="", description=about)
                for name, (_, about) in OVERRIDES.items()
            ),
            OpaqueFunction(function=start),
        ]
    )
