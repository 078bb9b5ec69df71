//go:build !amd64 || noasm

package kernel

func detectAVX2() bool { return false }
