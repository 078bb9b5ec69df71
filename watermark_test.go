package spirt

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"testing"
)

func TestWatermark(t *testing.T) {
	path := filepath.Join(t.TempDir(), watermarkFile)
	if slot, counter, err := readWatermark(path); slot != 0 || counter != 0 || err != nil {
		t.Fatalf("a new peer has signed up to slot %d and counter %d: %v", slot, counter, err)
	}
	for _, want := range [][2]uint64{{1, 2}, {0, 0}, {16, 1 << 40}, {math.MaxUint64, math.MaxUint64}, {7, 7}} {
		check(t, writeWatermark(path, want[0], want[1]))
		slot, counter, err := readWatermark(path)
		check(t, err)
		if slot != want[0] || counter != want[1] {
			t.Errorf("read %d and %d, wrote %v", slot, counter, want)
		}
	}
}

// A watermark of which anything is lost or changed is not read as a smaller
// one: the peer would sign twice.
func TestWatermarkDamaged(t *testing.T) {
	whole := string(formatWatermark(123, 4567))
	damaged := []string{"", "\n", "slot counter\n", "slot 1 counter\n", "slot -1 counter 2\n", "slot 18446744073709551616 counter 1\n",
		"slot 1 counter 2\nslot 0 counter 0\n", "slot 01 counter 2\n", "slot  1 counter 2\n", " " + whole, whole + " ", "\x00\x00\x00\x00", string(make([]byte, 2000))}
	for i := range whole {
		damaged = append(damaged, whole[:i])
	}
	for _, text := range damaged {
		path := writeTemp(t, watermarkFile, text)
		if slot, counter, err := readWatermark(path); err == nil {
			t.Errorf("%q was read as slot %d, counter %d", text, slot, counter)
		} else {
			refused(t, err, path)
		}
	}
	refused(t, func() error { _, _, err := readWatermark(writeTemp(t, watermarkFile, "slot 1")); return err }(), "sign twice", "write back")
}

// Where it cannot be written, the peer is told, and the old one stands.
func TestWatermarkNotWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	refused(t, writeWatermark(filepath.Join(dir, watermarkFile), 1, 1), dir)
	check(t, os.Mkdir(dir, 0o755))
	path := filepath.Join(dir, watermarkFile)
	check(t, os.Mkdir(path, 0o755)) // a file cannot take its place
	refused(t, writeWatermark(path, 1, 1), path)
	entries, err := os.ReadDir(dir)
	check(t, err)
	if len(entries) != 1 {
		t.Errorf("a temporary file stays behind: %v", entries)
	}
}

func FuzzWatermark(f *testing.F) {
	f.Add([]byte("slot 1 counter 2\n"))
	f.Add([]byte("slot 18446744073709551615 counter 18446744073709551615\n"))
	f.Add([]byte("slot 0x1 counter 2\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		slot, counter, err := parseWatermark(b)
		if err == nil && fmt.Sprintf("slot %d counter %d\n", slot, counter) != string(b) {
			t.Errorf("%q was read as slot %d, counter %d", b, slot, counter)
		}
	})
}
