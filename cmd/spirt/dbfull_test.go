//go:build integration && linux

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spirt-ml/spirt/resp"
)

// On a disk that is really full SAVE fails and says what to do, the database
// goes on, and once there is room SAVE works again.
func TestDatabaseFullDisk(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatalf("mounting needs root: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(disk, syscall.MNT_DETACH) })
	r := startDB(t, filepath.Join(disk, "db"), "--save-every", "0")
	c := r.dial()
	r.do(c, "TENSOR.SET", "x", "uint8", 1, 1<<20, strings.Repeat("x", 1<<20))
	r.do(c, "SAVE")
	ballast := filepath.Join(disk, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 5<<19), 0o600); err != nil {
		t.Fatal(err)
	}
	r.do(c, "TENSOR.SET", "y", "uint8", 1, 3, "abc")
	for range 2 {
		_, err := c.Do(t.Context(), "SAVE")
		var refused *resp.Error
		if !errors.As(err, &refused) || !strings.Contains(refused.Message, "no space left on the disk of") || !strings.Contains(refused.Message, "make room there") {
			t.Fatalf("SAVE on a full disk: %v", err)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(disk, "db", "*.tmp")); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	if info := string(r.do(c, "INFO").Bytes); !strings.Contains(info, "last_save_status:err") {
		t.Error(info)
	}
	r.do(c, "TENSOR.SET", "z", "uint8", 1, 3, "abc")
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	r.do(c, "SAVE")
	r.stop(os.Kill)
	r = startDB(t, filepath.Join(disk, "db"))
	if r.ready["tensors"] != 3.0 {
		t.Errorf("recovered %v", r.ready)
	}
	r.stop(os.Kill)
}
