# A Linux guest goes on from a checkpoint, and from an incremental one, in another vmm: its jobs have lost nothing.
needs --initrd --restore
bridge br0 $HOST_IP/24; tap tap0 br0; tap tap1 br0
linux_start first "or.ip=$GUEST_IP/24" --cpus 2 --net id=net0,tap=tap0,mac=$GUEST_MAC
guest_up first 90
guest "sh /jobs/diskwork >/dev/null 2>&1 &"
rounds() { guest 'cat /tmp/rounds 2>/dev/null || echo 0'; }
working() { [ $(rounds) -gt $1 ]; }
wait_for 60 working 9 || fail "the job does not begin: $(rounds) rounds"
dir=/tmp/checkpoints; mkdir $dir
api first POST /v1/vm/checkpoint "{\"path\":\"$dir/one\"}" > one.log || fail "no checkpoint: $(cat one.log)"
note "checkpoint: $(tr -d '\n' < one.log)"
wait_for 30 working $(rounds) || fail "the job does not go on after a checkpoint"
api first POST /v1/vm/checkpoint "{\"path\":\"$dir/two\",\"parent\":\"$dir/one\",\"stop\":true}" > two.log || fail "no incremental checkpoint: $(cat two.log)"
note "incremental: $(tr -d '\n' < two.log)"
ended first 20 0
vmm_start second --restore $dir/two --net id=net0,tap=tap1
wait_for 30 state_is second running || fail "no VM from the checkpoint"
wait_for 30 guest true || fail "the restored guest does not answer"
wait_for 30 working $(rounds) || fail "the job does not go on in the restored guest: $(guest 'cat /tmp/differs')"
guest "touch /tmp/stop"
stopped() { guest "test -e /tmp/stopped"; }
wait_for 30 stopped || fail "the job found: $(guest cat /tmp/differs)"
# Half a file is no checkpoint.
mkdir $dir/cut; cp $dir/one/* $dir/cut/; head -c 1000 $dir/one/state > $dir/cut/state
if timeout 20 vmm --restore $dir/cut --net id=net0,tap=tap0 >cut.log 2>&1; then wrong "a cut checkpoint is not refused"; fi
grep -q "ends too early" cut.log || fail "a cut checkpoint is refused without the reason: $(cat cut.log)"
