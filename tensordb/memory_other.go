//go:build !unix

package tensordb

func mapBuffer(n int) ([]byte, error) { return make([]byte, n), nil }

func unmapBuffer([]byte) {}
