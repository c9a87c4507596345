# A file system is made and filled; every byte is there after a reboot of the guest, and in another process, read-only.
needs --initrd
truncate -s 64M /tmp/disk
bridge br0 $HOST_IP/24; tap tap0 br0; tap tap1 br0
linux_start inner "or.ip=$GUEST_IP/24" --disk id=data,path=/tmp/disk --net tap=tap0,mac=$GUEST_MAC
guest_up inner 60
begin=$(now)
guest "sh /jobs/fill /dev/vda 1" || fail "the file system cannot be filled"
note "filled after $(since $begin) s"
guest "cat /sys/block/vda/serial"
begin=$(now)
order "reboot -f"
guest_up inner 60 2
note "rebooted after $(since $begin) s"
guest "sh /jobs/check /dev/vda" || fail "the file system is not as it was before the reboot"
order "poweroff -f"
ended inner 20 0

linux_start again "or.ip=$GUEST_IP/24" --disk id=data,path=/tmp/disk,readonly=true --net tap=tap1,mac=$GUEST_MAC
guest_up again 60
guest "sh /jobs/check /dev/vda" || fail "the file system is not as it was in another process"
[ "$(guest 'cat /sys/block/vda/ro')" = 1 ] || fail "a read-only disk is not read-only"
guest "dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null" && fail "a read-only disk was written"
api again PUT /v1/vm/shutdown >/dev/null || fail "no shutdown"
