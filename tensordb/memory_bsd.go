//go:build unix && !linux

package tensordb

func largePages([]byte) {}
