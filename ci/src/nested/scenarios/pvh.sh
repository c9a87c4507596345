# Debian's kernel as an ELF image with a PVH note comes as far as looking for its root file system.
vmm_start inner --image /guest/vmlinux --boot pvh --memory 256M --cmdline "console=ttyS0 panic=-1 $KERNEL_WORDS"
said inner 60 "Linux version"
said inner 60 "Unable to mount root fs\|GUEST: kernel is up"
