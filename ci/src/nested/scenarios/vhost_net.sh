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
