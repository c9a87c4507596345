# The small devices: entropy, streams to and from the host (vsock), memory given back (balloon, free-page reporting).
needs --initrd --rng --balloon --vsock
bridge br0 $HOST_IP/24; tap tap0 br0
linux_start inner "or.ip=$GUEST_IP/24" --rng --balloon reporting=true,deflate_on_oom=false --vsock path=$PWD/vsock.sock,cid=7 --net tap=tap0,mac=$GUEST_MAC
guest_up inner 60

[ "$(guest 'cat /sys/class/misc/hw_random/rng_current')" = virtio_rng.0 ] || wrong "the guest has no virtio-rng"
random() { guest "head -c 64 /dev/hwrng | md5sum"; }
[ "$(random)" != "$(random)" ] || wrong "the same random bytes twice"

# From the guest: the host listens on PATH_PORT. To the guest: CONNECT on PATH.
socat -u UNIX-LISTEN:vsock.sock_5000 CREATE:/tmp/from_guest & listener=$!
sum=$(guest "head -c 1000000 /dev/urandom > /tmp/v; md5sum < /tmp/v; socat -u OPEN:/tmp/v VSOCK-CONNECT:2:5000") || wrong "the guest cannot connect to the host by vsock"
wait $listener
[ "$sum" = "$(md5sum < /tmp/from_guest)" ] || wrong "a vsock stream from the guest arrives changed"
guest "socat -t 60 VSOCK-LISTEN:5001,fork,reuseaddr EXEC:cat >/dev/null 2>&1 &"
echoed() { { printf 'CONNECT 5001\n'; cat /tmp/from_guest; } | timeout 60 socat -t 30 - UNIX-CONNECT:vsock.sock > /tmp/echoed; head -n 1 /tmp/echoed | grep -q '^OK '; }
wait_for 10 echoed || wrong "no connection to the guest by vsock"
[ "$(tail -n +2 /tmp/echoed | md5sum)" = "$(md5sum < /tmp/from_guest)" ] || wrong "a vsock stream to the guest and back arrives changed"

# Memory the guest has used and freed goes back to the host by itself, and more of it by the balloon.
resident() { awk '/VmRSS/ { print int($2 / 1024) }' /proc/$(cat inner.pid)/status; }
guest "dd if=/dev/zero of=/tmp/ballast bs=1M count=64 2>/dev/null"; full=$(resident)
guest "rm /tmp/ballast"
given_back() { [ $(resident) -lt $((full - $1)) ]; }
wait_for 20 given_back 40 || wrong "freed memory is not reported: $(resident) MiB resident after $full"
note "$full MiB resident with 64 MiB used, $(resident) after they were freed"
total() { guest "awk '/MemTotal/ { print int(\$2 / 1024) }' /proc/meminfo"; }
before=$(total)
if ! vmm --help | grep -q "^ *ctl"; then
    note "the balloon is not filled: vmm has no ctl"
elif vmm ctl --sock inner.sock balloon 96M >ctl.log 2>&1; then
    inflated() { [ $(total) -lt $((before - 80)) ]; }
    wait_for 30 inflated || wrong "the balloon does not fill: the guest has $(total) MiB, before $before"
    vmm ctl --sock inner.sock balloon 0 >>ctl.log 2>&1
    deflated() { [ $(total) = $before ]; }
    wait_for 30 deflated || wrong "the balloon does not empty: the guest has $(total) MiB, before $before"
else
    wrong "vmm ctl balloon fails: $(cat ctl.log)"
fi
