# Large transfers both ways arrive whole, in frames larger than the MTU: checksum and segmentation offload work.
needs --initrd
bridge br0 $HOST_IP/24; tap tap0 br0
linux_start inner "or.ip=$GUEST_IP/24" --net tap=tap0,mac=$GUEST_MAC
guest_up inner 60
traffic tap0
[ $to_average -gt 3000 ] || fail "frames to the guest have $to_average bytes: no segmentation offload"
[ $from_average -gt 3000 ] || fail "frames from the guest have $from_average bytes: no segmentation offload"
[ "$(guest 'cat /sys/class/net/eth0/address')" = $GUEST_MAC ] || fail "not the address that was configured"
