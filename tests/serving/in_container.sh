#!/bin/sh
# What a container's runtime does for an image, by Linux alone: a root that is read-only, /tmp and /dev/shm in memory, a
# user without rights, processes and ports of its own, no environment but what is given. Nothing stays behind.
#
#   unshare --user --map-root-user --mount --pid --net --fork --kill-child --mount-proc \
#       sh in_container.sh USER GROUP FOLDER "KEPT ..." NAME=VALUE ... COMMAND ...
#
# FOLDER: an empty one, which becomes /tmp. KEPT: folders that must be there inside too; those under /tmp are put back.
set -eu
user=$1 group=$2 new=$3 kept=$4
shift 4
ip link set lo up
ip address add 10.0.0.2/32 dev lo # Ray asks which address leads to the world
ip route add default dev lo src 10.0.0.2
mount --make-rprivate /
mount -t tmpfs -o size=512m tmpfs "$new"
for folder in $kept; do
    case $folder in /tmp/*)
        mkdir -p "$new${folder#/tmp}"
        mount --bind "$folder" "$new${folder#/tmp}"
        mount -o remount,bind,ro "$new${folder#/tmp}"
    esac
done
mount --move "$new" /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -o remount,bind,ro /
cd /
exec unshare --user --map-user="$user" --map-group="$group" setpriv --no-new-privs env -i "$@"
