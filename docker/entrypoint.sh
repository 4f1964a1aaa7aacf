#!/bin/bash
# Sources ROS and the workspace, then becomes the command: signals reach it directly.
set -e
source "/opt/ros/${ROS_DISTRO}/setup.bash"
source /ws/install/setup.bash
exec "$@"
