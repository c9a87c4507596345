# The first steps of docs/vmm.md: each command does what the page says, and prints what it shows.
cp /first-steps/vmlinuz /first-steps/initrd.img /first-steps/disk.img .
bash /first-steps/run.bash || { [ -e verdict ] || echo "the steps end with $?" > verdict; fail "$(cat verdict)"; }
