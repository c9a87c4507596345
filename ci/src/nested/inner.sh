#!/bin/busybox sh
# Init of the Linux guest under test. Words of the kernel's command line: or.ip=ADDRESS/BITS (eth0), or.job=NAME (a script below
# /jobs, run once the network is there). Everything else is ordered by the command server.
export PATH=/bin:/usr/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
mkdir -p /dev/pts; mount -t devpts pts /dev/pts
for order in /modules/*.order; do
    for m in $(cat $order); do grep -q "^$(echo $m | tr - _) " /proc/modules || insmod /modules/$m.ko; done
done
# The value of a word of the command line.
word() { tr ' ' '\n' < /proc/cmdline | sed -n "s/^$1=//p"; }
echo "GUEST: kernel is up after $(cut -d ' ' -f 1 /proc/uptime) s, $(grep -c ^processor /proc/cpuinfo) processors"
ip link set lo up
address=$(word or.ip)
if [ -n "$address" ]; then
    ip addr add $address dev eth0 && ip link set eth0 up && echo "GUEST: network is up"
    # The shell has the connection itself, once, so that it ends with the shell, whatever goes on in the background.
    echo 'exec 2>&1 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- /bin/sh' > /serve
    socat TCP-LISTEN:7000,fork,reuseaddr EXEC:"/bin/sh /serve",nofork &
fi
# The power button, as any event of that input device.
for input in /sys/class/input/event*; do
    grep -qs "Power Button" $input/device/name || continue
    (head -c 24 /dev/input/${input##*/} >/dev/null && echo "GUEST: power button" && sync && poweroff -f) &
done
job=$(word or.job)
[ -n "$job" ] && . /jobs/$job
echo "GUEST: ready"
# What is typed on the console is run, without a prompt (through cat: ash would take it for a terminal and ask what it can do).
while :; do sh </dev/ttyS0 2>&1 | cat; sleep 1; done
