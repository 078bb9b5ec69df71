//go:build amd64 && !noasm

package kernel

import "golang.org/x/sys/cpu"

func detectAVX2() bool { return cpu.X86.HasAVX2 && cpu.X86.HasFMA }

// f16c tells whether the CPU converts halves; all that is known to have AVX2
// does, but a virtual one may hide it.
var f16c = cpuid1()>>29&1 == 1
