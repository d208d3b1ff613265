#!/bin/busybox sh
# Process 1 of the guest, twice: from the initramfs it puts the root file system
# together, then from that (with the argument "command") it runs the command.
#
# /run/settings: shell variables TOKEN, FOLDER, SHARES, COMMAND, ALIVE, LIMIT.   /run/command: a script.

if [ "$1" != command ]; then
    b=/bin/busybox
    $b mount -t proc proc /proc
    $b mount -t sysfs sysfs /sys
    $b mount -t devtmpfs dev /dev
    . /run/settings
    while read -r module; do $b insmod "$module"; done </lib/order

    p9=trans=virtio,version=9p2000.L,msize=512000
    $b mount -t 9p -o $p9,ro,cache=loose host /host
    $b mount -t tmpfs -o size=75% upper /upper
    $b mkdir /upper/data /upper/work
    overlay=lowerdir=/host,upperdir=/upper/data,workdir=/upper/work
    $b mount -t overlay -o $overlay,xino=off,index=off root /root

    version=$($b uname -r)
    # A current directory under /tmp or /run would vanish under what is mounted there.
    $b mkdir -p /keep "/root/lib/modules/$version"
    case $FOLDER in
        /tmp/* | /run/* | /dev/shm/*) $b mount --bind "/root$FOLDER" /keep && KEPT=1 ;;
    esac
    $b mount -t 9p -o $p9,ro,cache=loose modules "/root/lib/modules/$version"
    $b mount --move /proc /root/proc
    $b mount --move /sys /root/sys
    $b mount --move /dev /root/dev
    $b mount -t tmpfs -o mode=1777 tmp /root/tmp
    $b mount -t tmpfs -o mode=755 run /root/run
    $b mkdir -p /root/dev/pts /root/dev/shm /root/dev/scratch /root/run/lock /root/run/vm
    $b mount -t devpts -o ptmxmode=666,mode=620,gid=5 pts /root/dev/pts
    $b mount -t tmpfs -o mode=1777 shm /root/dev/shm
    if [ "$KEPT" ]; then
        $b mkdir -p "/root$FOLDER"
        $b mount --move /keep "/root$FOLDER"
    fi

    tag=0
    echo "$SHARES" | while read -r share; do
        [ "$share" ] || continue
        $b mkdir -p "/root$share"
        $b mount -t 9p -o $p9,access=any,cache=mmap "share$tag" "/root$share"
        tag=$((tag + 1))
    done
    $b cp /bin/busybox /init /run/* /root/run/vm/
    exec $b switch_root /root /run/vm/busybox sh /run/vm/init command
fi

b=/run/vm/busybox
. /run/vm/settings
$b ln -sf /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do
    $b ln -sf "/proc/self/fd/${number%:*}" "/dev/${number#*:}"
done
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
$b mount -t debugfs debugfs /sys/kernel/debug
$b hostname vm
$b ifconfig lo 127.0.0.1 up
for serial in /sys/block/vd*/serial; do
    [ -e "$serial" ] || continue
    disk=${serial%/serial}
    read -r name <"$serial"
    [ "$name" ] || name=$($b cat "$serial")
    $b ln -s "/dev/${disk##*/}" "/dev/scratch/$name"
done

# The machine starts with one CPU: see machine.py.
for cpu in /sys/devices/system/cpu/cpu*/online; do
    [ "$($b cat "$cpu")" = 1 ] || echo 1 >"$cpu"
done

# Through a pipe, because a port can be opened only once and the command may open /dev/stdout.
for port in /sys/class/virtio-ports/*; do port=/dev/${port##*/}; done
exec 3>"$port"
$b mkfifo /run/vm/output
$b cat /run/vm/output >&3 &
cat=$!
echo "$COMMAND" >/dev/kmsg
# The host takes a machine that says nothing for one that hangs.
(exec 3>&-; while echo "$ALIVE" >/dev/kmsg; do $b sleep 10; done) &
# Shortly before the host gives up: which tasks wait for what.
(exec 3>&-; $b sleep "$LIMIT"; echo w >/proc/sysrq-trigger) &
/run/vm/command </dev/null >/run/vm/output 2>&1 3>&-
status=$?
# A daemon that the command left behind may hold the pipe open for ever.
($b sleep 1; $b kill $cat) 2>/dev/null &
wait $cat 2>/dev/null
$b sync
printf '%s %d\n' "$TOKEN" $status >&3
$b sleep 60  # the host ends the machine here
$b poweroff -f
