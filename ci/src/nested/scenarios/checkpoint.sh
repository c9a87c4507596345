# A Linux guest goes on from a checkpoint, and from an incremental one, in another vmm: its jobs have lost nothing. A copy knows that it is one.
needs --initrd --restore
bridge br0 $HOST_IP/24; tap tap0 br0; tap tap1 br0
truncate -s 64M /tmp/disk
dir=/tmp/checkpoints; mkdir $dir
linux_start first "or.ip=$GUEST_IP/24" --cpus 2 --allow-path $dir --disk id=data,path=/tmp/disk --vsock path=$PWD/first.vsock,cid=7 \
    --net id=net0,tap=tap0,mac=$GUEST_MAC
guest_up first 90
guest "/usr/sbin/mke2fs -q -t ext4 -F /dev/vda; sh /jobs/diskwork /dev/vda >/dev/null 2>&1 &"
rounds() { guest 'cat /tmp/rounds 2>/dev/null || echo 0'; }
working() { [ $(rounds) -gt $1 ]; }
wait_for 60 working 9 || fail "the job does not begin: $(rounds) rounds"
# A stream that is open, and one that can be opened.
guest "socat -t 60 VSOCK-LISTEN:5001,fork,reuseaddr EXEC:cat >/dev/null 2>&1 &"
echoed() { printf 'CONNECT 5001\nhello\n' | timeout 20 socat -t 5 - UNIX-CONNECT:$1 | grep -q hello; }
wait_for 10 echoed first.vsock || fail "no connection to the guest by vsock"
socat UNIX-LISTEN:first.vsock_5000 EXEC:"sleep 1000" &
guest "(socat -u VSOCK-CONNECT:2:5000 CREATE:/tmp/stream; touch /tmp/stream_ended) >/dev/null 2>&1 &"
wait_for 10 guest "test -e /tmp/stream" || fail "the guest cannot connect to the host by vsock"
ends() { guest "test -e /tmp/stream_ended"; }
# Events the guest was told of by ACPI.
told() { guest "grep ACPI:Ged /proc/interrupts" | awk '{ print $2 + $3 }'; }
id=$(generation) events=$(told)

api first POST /v1/vm/checkpoint "{\"path\":\"$dir/one\"}" > one.log || fail "no checkpoint: $(cat one.log)"
note "checkpoint: $(tr -d '\n' < one.log)"
wait_for 30 working $(rounds) || fail "the job does not go on after a checkpoint"
ends && fail "a VM that goes on after a checkpoint has lost a vsock stream"
api first POST /v1/vm/checkpoint "{\"path\":\"$dir/two\",\"parent\":\"$dir/one\",\"stop\":true}" > two.log || fail "no incremental checkpoint: $(cat two.log)"
note "incremental: $(tr -d '\n' < two.log)"
ended first 20 0
# What the disk is from here on belongs to this checkpoint.
cp /tmp/disk /tmp/disk.two

vmm_start second --restore $dir/two --net id=net0,tap=tap1 --vsock path=$PWD/second.vsock
wait_for 30 state_is second running || fail "no VM from the checkpoint"
wait_for 30 guest true || fail "the restored guest does not answer"
wait_for 30 working $(rounds) || fail "the job does not go on in the restored guest: $(guest 'cat /tmp/differs')"
[ ${#id} -gt 30 ] && [ "$(generation)" = "$id" ] || wrong "the only VM of a checkpoint has another VM generation id: $(generation), not $id"
[ "$(told)" = "$events" ] || wrong "the only VM of a checkpoint is told of something: $events events before, $(told) now"
wait_for 20 ends || wrong "a vsock stream of before the checkpoint is still open"
wait_for 10 echoed second.vsock || wrong "no connection to the restored guest by vsock"
guest "touch /tmp/stop"
stopped() { guest "test -e /tmp/stopped"; }
wait_for 30 stopped || fail "the job found: $(guest cat /tmp/differs)"
api second PUT /v1/vm/shutdown >/dev/null; ended second 20 0

# Once more from there, with the disk as it was: a copy.
vmm_start third --restore $dir/two --disk id=data,path=/tmp/disk.two --vsock path=$PWD/third.vsock
wait_for 30 state_is third running || fail "no second VM from the checkpoint"
wait_for 30 guest true || fail "the copy does not answer"
copy=$(generation)
[ ${#copy} = ${#id} ] && [ "$copy" != "$id" ] || wrong "a copy has the VM generation id of its original: $copy"
[ "$(told)" -gt "$events" ] || wrong "a copy is not told that it is one: $events events before, $(told) now"
guest "touch /tmp/stop"
wait_for 30 stopped || fail "the copy's job found: $(guest cat /tmp/differs)"
guest "/usr/sbin/e2fsck -fn /dev/vda >/dev/null 2>&1" || fail "the copy's file system is damaged"
# Half a file is no checkpoint.
mkdir $dir/cut; cp $dir/one/* $dir/cut/; head -c 1000 $dir/one/state > $dir/cut/state
if timeout 20 vmm --restore $dir/cut --net id=net0,tap=tap0 >cut.log 2>&1; then wrong "a cut checkpoint is not refused"; fi
grep -q "ends too early" cut.log || fail "a cut checkpoint is refused without the reason: $(cat cut.log)"
