# A Linux guest with two vCPUs moves to another vmm and on to a third, while a TCP connection and a job in its memory run on.
needs --initrd --receive
# Passed in 100 s, and once stood still in its second port for 150 s, nobody knows yet why: not in the run of every day before that is found.
skip "unsteady: it once stood still in the second port; take this line out of migrate.sh to run it"
travel
