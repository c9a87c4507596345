# Two vCPUs: Linux starts both, both compute, one is switched off and on again, and both stop for a pause.
needs --initrd --cpus
bridge br0 $HOST_IP/24; tap tap0 br0
linux_start inner "or.ip=$GUEST_IP/24" --cpus 2 --net tap=tap0,mac=$GUEST_MAC
guest_up inner 90
said inner 1 "kernel is up after .*, 2 processors"
note "$(grep -o 'kernel is up after.*' inner.console)"
guest "cat /sys/devices/system/cpu/cpu*/topology/core_id /sys/devices/system/cpu/cpu1/topology/thread_siblings_list" || fail "no topology"
# Each counts on its own vCPU; not at full speed, because both share the one CPU there is.
guest 'for c in 0 1; do (taskset -c $c sh -c "i=0; while :; do i=\$((i+1)); echo \$i > /tmp/count$c.new; mv /tmp/count$c.new /tmp/count$c; usleep 20000; done" >/dev/null 2>&1 &); done'
sleep 2
counts() { guest 'cat /tmp/count0 /tmp/count1' | tr '\n' ' '; }
advance() { [ $3 -gt $1 ] && [ $4 -gt $2 ]; }
one=$(counts); sleep 2; two=$(counts)
advance $one $two || fail "not both vCPUs compute: $one, then $two"
guest "echo 0 > /sys/devices/system/cpu/cpu1/online && echo 1 > /sys/devices/system/cpu/cpu1/online" || fail "a vCPU cannot be switched off and on"
[ "$(guest 'grep -c ^processor /proc/cpuinfo')" = 2 ] || fail "the vCPU has not come back"
api inner PUT /v1/vm/pause >/dev/null || fail "no pause"
used() { awk '{ print $14 + $15 }' /proc/$(cat inner.pid)/stat; }
before=$(used); sleep 2; after=$(used)
[ $((after - before)) -lt 30 ] || fail "the paused VM used $((after - before)) ticks of processor time in 2 s"
api inner PUT /v1/vm/resume >/dev/null || fail "no resume"
one=$(counts); sleep 2; two=$(counts)
advance $one $two || fail "not both vCPUs compute after a pause: $one, then $two"
