package spirt

import (
	"testing"
	"testing/fstest"
)

func TestLimits(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	h := host{memory: 8 << 30}
	h.limits(fstest.MapFS{"a/cpu.max": file("150000 100000\n"), "a/b/cpu.max": file("max 100000\n"), "a/memory.max": file("1073741824\n"), "a/b/memory.max": file("max\n")}, "/a/b")
	if h.quota != 1.5 || h.memory != 1<<30 {
		t.Errorf("%+v", h)
	}
	h = host{memory: 8 << 30}
	h.limits(fstest.MapFS{"x": file("")}, "/")
	if h.quota != 0 || h.memory != 8<<30 {
		t.Errorf("%+v", h)
	}
}
