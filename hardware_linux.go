package spirt

import (
	"os"
	"strings"
)

// machine names the CPU, the system and its kernel.
func machine() (cpu, system, kernel string) {
	for _, key := range []string{"model name", "Model", "Hardware", "uarch"} {
		if cpu = field("/proc/cpuinfo", key, ":"); cpu != "" {
			break
		}
	}
	system = strings.Trim(field("/etc/os-release", "PRETTY_NAME", "="), `"`)
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = "Linux " + strings.TrimSpace(string(b))
	}
	return cpu, system, kernel
}

// field returns the first value of a key in a file of the system.
func field(path, key, sep string) string {
	b, err := readFile(path, 4<<20)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, sep); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
