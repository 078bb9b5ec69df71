package spirt

import (
	"errors"
	"fmt"
	"os"
)

// readWatermark reads what a peer may have signed: after a restart it signs
// nothing at or below it. A new peer has no file and so signed nothing.
func readWatermark(path string) (slot, counter uint64, err error) {
	b, err := readFile(path, 1<<10)
	if errors.Is(err, os.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	if n, err := fmt.Sscanf(string(b), "slot %d counter %d\n", &slot, &counter); n != 2 {
		return 0, 0, fmt.Errorf("watermark %s: %w: without it this peer could sign twice; write back the numbers or leave the job", path, err)
	}
	return slot, counter, nil
}

// writeWatermark makes the watermark durable before it returns.
func writeWatermark(path string, slot, counter uint64) error {
	return writeFileAtomic(path, fmt.Appendf(nil, "slot %d counter %d\n", slot, counter), 0o644)
}
