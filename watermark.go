package spirt

import (
	"bytes"
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
	if slot, counter, err = parseWatermark(b); err != nil {
		return 0, 0, fmt.Errorf("watermark %s: %w: without it this peer could sign twice; write back the numbers or leave the job", path, err)
	}
	return slot, counter, nil
}

// parseWatermark accepts what formatWatermark makes and nothing else: a number
// that lost its last digits would be a smaller one.
func parseWatermark(b []byte) (slot, counter uint64, err error) {
	if _, err := fmt.Sscanf(string(b), "slot %d counter %d\n", &slot, &counter); err != nil {
		return 0, 0, err
	}
	if !bytes.Equal(b, formatWatermark(slot, counter)) {
		return 0, 0, fmt.Errorf("it should be one line as %q, not %.80q", formatWatermark(slot, counter), b)
	}
	return slot, counter, nil
}

func formatWatermark(slot, counter uint64) []byte {
	return fmt.Appendf(nil, "slot %d counter %d\n", slot, counter)
}

// writeWatermark makes the watermark durable before it returns.
func writeWatermark(path string, slot, counter uint64) error {
	return writeFileAtomic(path, formatWatermark(slot, counter), 0o644)
}
