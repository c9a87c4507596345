# The same with vhost-net: the kernel moves the frames.
needs --initrd vhost
load vhost_net || skip "no kernel module vhost_net"
bridge br0 $HOST_IP/24; tap tap0 br0
linux_start inner "or.ip=$GUEST_IP/24" --net tap=tap0,mac=$GUEST_MAC,vhost=on
guest_up inner 60
ps | grep -q "\[vhost-$(cat inner.pid)\]" || fail "the kernel has no vhost thread of this vmm"
traffic tap0
[ $to_average -gt 3000 ] || fail "frames to the guest have $to_average bytes: no segmentation offload"
[ $from_average -gt 3000 ] || fail "frames from the guest have $from_average bytes: no segmentation offload"
# Its rings come back while there are limits, or a copy of memory is made, and go over again afterwards.
metrics_say() { api inner GET /v1/metrics | grep -q "^vmm_net_vhost{device=\"net0\"} $1\$"; }
wait_for 5 metrics_say 1 || fail "vhost-net does not serve the queues: $(api inner GET /v1/metrics | grep vmm_net_vhost)"
api inner PUT /v1/devices/net0/limits '{"tx_limits":{"bytes":{"rate":"1G"}}}' >/dev/null || fail "no limits"
wait_for 5 metrics_say 0 || fail "vhost-net serves the queues in spite of limits"
MIB=4 traffic tap0
api inner PUT /v1/devices/net0/limits '{"tx_limits":{}}' >/dev/null || fail "the limits stay"
wait_for 5 metrics_say 1 || fail "vhost-net does not serve the queues again"
MIB=4 traffic tap0
# A command of the guest (its address list) is served in between.
guest "ip link set eth0 promisc on; ip link set eth0 promisc off" || fail "the guest's commands fail"
wait_for 5 metrics_say 1 || fail "vhost-net does not serve the queues after a command"
ping -c 2 -W 5 $GUEST_IP >ping.log || fail "no answer after a command"
# A guest that begins again takes nothing of the old rings along, and is served by the kernel as well.
order "reboot -f"
guest_up inner 60 2
wait_for 5 metrics_say 1 || fail "vhost-net does not serve the queues after a reboot"
MIB=4 traffic tap0
api inner PUT /v1/vm/reset >/dev/null || fail "no reset"
guest_up inner 60 3
wait_for 5 metrics_say 1 || fail "vhost-net does not serve the queues after a reset"
MIB=4 traffic tap0
