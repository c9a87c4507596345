# The same with a disk both vmm can reach: the job verifies an ext4 all the while.
needs --initrd --receive
truncate -s 64M /tmp/disk
# Emulated ciphers take so long for a whole memory that a round exceeds its limit; `migrate` is encrypted.
TLS=off
CPUS=1 DISK="--disk id=data,path=/tmp/disk" DEVICE=/dev/vda travel
