package spirt

import "syscall"

// machine names the CPU, the system and its kernel.
func machine() (cpu, system, kernel string) {
	// What is not there is empty.
	cpu, _ = syscall.Sysctl("machdep.cpu.brand_string")
	system, _ = syscall.Sysctl("kern.osproductversion")
	kernel, _ = syscall.Sysctl("kern.osrelease")
	return cpu, "macOS " + system, "Darwin " + kernel
}
