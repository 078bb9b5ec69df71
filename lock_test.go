package spirt

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

func TestLockPeer(t *testing.T) {
	dir := t.TempDir()
	release, err := lockPeer(dir, 2)
	if err != nil {
		t.Fatal(err)
	}
	want := "peer 2 of this run is running already, as process " + strconv.Itoa(os.Getpid())
	if _, err := lockPeer(dir, 2); err == nil || !strings.Contains(err.Error(), want) {
		t.Fatalf("a second peer: %v, want %q", err, want)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	// What an ended process left in the file does not matter.
	if err := os.WriteFile(filepath.Join(dir, lockFileName), []byte("4194305123 and more\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	release, err = lockPeer(dir, 2)
	if err != nil {
		t.Fatalf("after the first was released: %v", err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
}

// A second process of a peer is refused before it touches anything of the
// first one's: its events, its database, its socket.
func TestSecondPeerRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	job := Job{Peers: 1, Model: "logistic", Rounds: 1}
	if err := job.Resolve(); err != nil {
		t.Fatal(err)
	}
	if err := createRun(dir, job); err != nil {
		t.Fatal(err)
	}
	cfg := PeerConfig{Run: dir, Peer: 1, Executable: os.Args[0]}
	first, err := openPeer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer first.close()
	socket := filepath.Join(first.dir, socketFile)
	before, statErr := os.Stat(socket)
	if err := RunPeer(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "running already") {
		t.Errorf("a second process of peer 1: %v", err)
	}
	if statErr == nil { // a long path has its socket elsewhere
		if after, err := os.Stat(socket); err != nil || !os.SameFile(before, after) {
			t.Errorf("the socket of the first peer was replaced: %v", err)
		}
	}
	if err := first.close(); err != nil {
		t.Fatal(err)
	}
	again, err := openPeer(cfg)
	if err != nil {
		t.Fatalf("after the first one ended: %v", err)
	}
	if err := again.close(); err != nil {
		t.Error(err)
	}
}

// Who only asks, as `spirt runs` does, keeps nobody from a lock, and is not
// taken for its holder.
func TestAskingLocksNothing(t *testing.T) {
	dir := t.TempDir()
	release, err := lockPeer(dir, 1)
	check(t, err)
	check(t, release())
	ctx, stop := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for range 2 {
		asking.Go(func() {
			for ctx.Err() == nil {
				isHeld(filepath.Join(dir, lockFileName))
			}
		})
	}
	defer asking.Wait()
	defer stop()
	for range 300 {
		if held, pid, err := holder(filepath.Join(dir, lockFileName)); held || err != nil {
			t.Fatalf("held by %d, %v", pid, err)
		}
		if isHeld(filepath.Join(dir, lockFileName)) {
			t.Fatal("held by nobody")
		}
		release, err := lockPeer(dir, 1)
		if err != nil {
			t.Fatal(err)
		}
		if !isHeld(filepath.Join(dir, lockFileName)) {
			t.Fatal("not held")
		}
		check(t, release())
	}
}
