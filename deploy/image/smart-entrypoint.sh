#!/opt/chrek/bin/sh
# The ENTRYPOINT of a checkpoint-enabled image: finds the application's command and hands it to ChReK's init.
#
# Whether this container restores, waits or starts cold is decided in one place, restore-entrypoint, from the
# variables it was given. The shell is the bundle's own, so that an image without one works too.

# image.sh holds the base image's ENTRYPOINT and CMD, as checkpoint-enable found them: as in the base image, the
# container's arguments replace the CMD and follow the ENTRYPOINT.
if [ -r /opt/chrek/image.sh ]; then
    . /opt/chrek/image.sh
fi
if [ "$#" -eq 0 ]; then
    echo "chrek: NO_COMMAND: this image was built without its base image's command, and the container gives no args." >&2
    echo "chrek: Build it with deploy/checkpoint-enable, which reads the command, or set args (not command) in the pod." >&2
    exit 2
fi
# A shell changes the environment it passes on: names with a dot or a dash are dropped, PWD, SHLVL and PATH are set.
# The application is to find what the runtime gave, so that is handed on beside it, byte by byte.
exec 9<<END
$(/opt/chrek/bin/busybox base64 /proc/$$/environ 2>/dev/null)
END
CHREK_ENVIRONMENT_FD=9
export CHREK_ENVIRONMENT_FD
exec /usr/local/bin/restore-entrypoint -- "$@"
