#!/bin/busybox sh
# Init of the emulated machine: runs the scenarios named in /env.sh one after the other, and powers off.
# What the host reads are the lines that begin with "@@" (ci/src/nested/verdict.rs).
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /run
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; ln -s /proc/self/fd /dev/fd
mount -t tmpfs -o size=80% tmp /tmp; mount -t tmpfs run /run; mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm
echo 1 > /proc/sys/kernel/printk
. /env.sh
. /lib.sh
for m in kvm-amd tun bridge; do load $m || { echo "@@ broken no kernel module $m"; poweroff -f; }; done
[ -e /dev/kvm ] || { echo "@@ broken no /dev/kvm"; poweroff -f; }
ip link set lo up
# The host nudges us on this line (Nudge in ci/src/nested/machine.rs): it must be open, and say nothing back.
stty -F /dev/ttyS1 raw -echo 2>/dev/null && cat /dev/ttyS1 > /dev/null 2>&1 &
echo "@@ up"

# Ends everything a scenario has started and empties its network.
tidy() {
    killall -9 vmm socat nc tail nfs-cp curl 2>/dev/null
    for d in $(ls /sys/class/net); do
        case $d in lo) ;; *) ip link set $d down; ip link del $d 2>/dev/null || brctl delbr $d 2>/dev/null ;; esac
    done
    rm -rf /tmp/*
}

for SCENARIO in $SCENARIOS; do
    export SCENARIO
    mkdir -p /run/$SCENARIO
    cd /run/$SCENARIO
    begin=$(now)
    echo "@@ begin $SCENARIO"
    timeout -k 5 $(cat /scenarios/$SCENARIO.limit) sh -c '. /env.sh; . /lib.sh; . /scenarios/$SCENARIO.sh' 2>&1 </dev/null
    status=$?
    [ $status = 0 ] && [ -e wrong ] && { status=1; tr '\n' ';' < wrong > verdict; }
    [ -e verdict ] && reason=$(cat verdict) || reason="ended with status $status"
    [ $status = 143 ] && reason="not done after $(cat /scenarios/$SCENARIO.limit) s"
    if [ $status = 0 ] || [ $status = 77 ]; then :; else
        [ -n "$VERBOSE" ] || for f in *.log *.console; do
            [ -s "$f" ] && { echo "-- $f"; tail -n $QUOTE "$f"; echo; }
        done
        [ -n "$VERBOSE" ] || dmesg | tail -n 20
    fi
    took=$(since $begin)
    # What was printed last may not end in a line end.
    echo
    case $status in
        0) echo "@@ end $SCENARIO ok $took" ;;
        77) echo "@@ end $SCENARIO skip $took $reason" ;;
        *) echo "@@ end $SCENARIO fail $took $reason" ;;
    esac
    cd /
    [ -n "$SHELL_AT_END" ] || tidy
done
if [ -n "$SHELL_AT_END" ]; then
    echo "@@ shell (all of lib.sh is there, and the files of docs/vmm.md; exit or Ctrl-A x ends the machine)"
    SCENARIO=shell; mkdir -p /run/shell; export SCENARIO HOME=/run/shell
    cp /first-steps/vmlinuz /first-steps/initrd.img /first-steps/disk.img /run/shell
    printf '. /env.sh; . /lib.sh; cd /run/shell\n' > /run/shell/.bashrc
    setsid cttyhack bash
fi
sync
poweroff -f
