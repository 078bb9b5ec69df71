//go:build !linux && !darwin

package spirt

import (
	"os"
	"runtime"
)

// machine names the CPU, where Windows sets it, and the system.
func machine() (cpu, system, kernel string) {
	return os.Getenv("PROCESSOR_IDENTIFIER"), runtime.GOOS, ""
}
