package kernel

import "os"

// avx2 selects the assembly. It is written once, before main, and only read
// after that.
var avx2 = os.Getenv("SPIRT_NOASM") != "1" && detectAVX2()

// HasAVX2 reports whether the AVX2 and FMA assembly is in use: the binary
// contains it, the CPU and the operating system support it, and
// SPIRT_NOASM=1 is not set.
func HasAVX2() bool { return avx2 }
