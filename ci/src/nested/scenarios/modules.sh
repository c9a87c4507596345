# The main job on AMD-V: both modules serve NFS, the N-module is ported to a second vmm and serves on.
# Both of its vmm processes are in one network here: what is tested is KVM on AMD-V.
bridge br0 $CLIENT_IP/24
for t in tapd tapn tapm; do tap $t br0; done
dd if=/dev/zero of=/tmp/disk bs=1M count=0 seek=256 2>/dev/null
dd if=/dev/urandom of=/tmp/in bs=1M count=4 2>/dev/null
serves() { nc -w 2 $1 $2 </dev/null; }

vmm_start dmodule --image /images/dmodule --memory 128M --cmdline "$DMODULE_CMDLINE" --disk id=disk0,path=/tmp/disk \
    --net id=net0,tap=tapd,mac=$DMODULE_MAC
wait_for 60 serves $FABRIC_IP $FABRIC_PORT || fail "the D-module does not serve"
vmm_start nmodule --image /images/nmodule --memory $NMODULE_MEMORY --cmdline "$NMODULE_CMDLINE" --vm-id $NMODULE_VM_ID \
    --arbiter $FABRIC_IP:$FABRIC_PORT --tls $(tls) --net id=net0,tap=tapn,mac=$NMODULE_MAC
wait_for 60 serves $NFS_IP $NFS_PORT || fail "the N-module does not serve"
timeout 120 nfs-cp /tmp/in "$NFS_URL" || fail "copying in failed"

vmm_start received --receive 127.0.0.1:7000 --tls $(tls) --net id=net0,tap=tapm
listening() { netstat -ltn | grep -q ":7000 "; }
wait_for 30 listening || fail "no receiving vmm"
api nmodule POST /v1/migrations '{"to":"127.0.0.1:7000"}' || fail "the port was refused"
wait_for 60 state_is received running || fail "the N-module was not ported"
timeout 120 nfs-cp "$NFS_URL" /tmp/out || fail "reading back after the port failed"
cmp /tmp/in /tmp/out || fail "the bytes differ"
