//go:build !linux

package function

import "log/slog"

// canReadMemory: these systems tell a process's resident memory only through cgo or private interfaces.
const canReadMemory = false

// memoryGroups would limit the memory of instances; here nothing does.
type memoryGroups struct{}

type memoryGroup struct{}

func newMemoryGroups(int, *slog.Logger) *memoryGroups { return nil }

func (*memoryGroups) add() *memoryGroup { return nil }

func (*memoryGroups) close() {}
