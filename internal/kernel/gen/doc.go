// Package gen is a module of its own, so that avo is no dependency of SPIRT.
// Each folder in it is a program that writes assembly and its Go stubs into
// the folder of package kernel; `go generate ./internal/kernel` runs them all.
package gen
