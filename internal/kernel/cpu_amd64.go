//go:build amd64 && !noasm

package kernel

import "golang.org/x/sys/cpu"

func detectAVX2() bool { return cpu.X86.HasAVX2 && cpu.X86.HasFMA }
