# A guest without an operating system, for KVM where a Linux kernel does not get through: each
# loop writes 16 pages from 0x20000 on and adds one to the 64-bit counter at 0x8000.
.code16
.globl _start
_start:
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov $0x2000, %ax
    mov %ax, %es
loop:
    xor %di, %di
touch:
    incw %es:(%di)
    add $0x1000, %di
    jnz touch
    addw $1, 0x8000
    adcw $0, 0x8002
    adcw $0, 0x8004
    adcw $0, 0x8006
    mov $2000, %cx
wait:
    loop wait
    jmp loop
.org 510
.word 0xaa55
