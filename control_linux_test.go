package spirt

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// A process that does not hold the lock is not signalled, not even if the lock
// is held and the file has its number.
func TestSignalOnlyTheHolder(t *testing.T) {
	other := exec.Command("sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer other.Wait()
	defer other.Process.Kill()
	dir := aRun(t, 1)
	lock := peerLock(dir, 1)
	number := []byte(strconv.Itoa(other.Process.Pid) + "\n")
	if err := os.WriteFile(lock, number, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := StopPeers(t.Context(), dir, StopConfig{Now: true}); err != nil || got[0].State != "absent" {
		t.Errorf("of a process that ended: %+v, %v", got, err)
	}
	release, err := lockPeer(peerDir(dir, 1), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if err := os.WriteFile(lock, number, 0o644); err != nil {
		t.Fatal(err)
	}
	sent := 0
	send := func(p *os.Process) { sent++ }
	if err := signalHolder(lock, other.Process.Pid, send); err == nil || !strings.Contains(err.Error(), "does not have it") || sent > 0 {
		t.Errorf("another process was sent %d signals: %v", sent, err)
	}
	if err := signalHolder(lock, os.Getpid(), send); err != nil || sent > 0 {
		t.Errorf("a number that is not that of the lock: %d signals, %v", sent, err)
	}
	if err := os.WriteFile(lock, []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := signalHolder(lock, os.Getpid(), send); err != nil || sent != 1 {
		t.Errorf("the process that has the lock was sent %d signals: %v", sent, err)
	}
}
