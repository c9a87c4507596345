# A disk served by another process (Debian's qemu-storage-daemon) by vhost-user: filled and read back by the guest.
needs --initrd vhost_user
truncate -s 64M /tmp/disk
qemu-storage-daemon --blockdev driver=file,node-name=file,filename=/tmp/disk --blockdev driver=raw,node-name=disk,file=file \
    --export type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$PWD/disk.sock,writable=on >daemon.log 2>&1 &
wait_for 10 test -S disk.sock || fail "qemu-storage-daemon makes no socket"
bridge br0 $HOST_IP/24; tap tap0 br0
linux_start inner "or.ip=$GUEST_IP/24" --disk id=data,vhost_user=$PWD/disk.sock --net tap=tap0,mac=$GUEST_MAC
guest_up inner 60
guest "sh /jobs/fill /dev/vda 3 && sh /jobs/check /dev/vda" || fail "the file system is not as it was made"
# What the guest was told is on the disk is in the daemon's file.
dd if=/tmp/disk bs=1 skip=1080 count=2 2>/dev/null | hexdump | grep -q ef53 || fail "the daemon's file has no ext4"
# A guest that begins again, by itself or from outside while it reads, finds the disk there, by the same connection.
order "reboot -f"
guest_up inner 60 2
guest "sh /jobs/check /dev/vda" || fail "the file system is not as it was after a reboot"
order "dd if=/dev/vda of=/dev/null bs=64k iflag=direct &"
api inner PUT /v1/vm/reset >/dev/null || fail "no reset"
guest_up inner 60 3
guest "sh /jobs/check /dev/vda" || fail "the file system is not as it was after a reset"
api inner GET /v1/metrics | grep -q '^vmm_vhost_user_lost_total{device="data"} 0$' || fail "the back end was lost"
