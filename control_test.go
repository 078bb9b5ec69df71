package spirt

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// aRun makes what Processes looks at.
func aRun(t *testing.T, peers ...int) string {
	t.Helper()
	dir := t.TempDir()
	for _, n := range peers {
		if err := os.MkdirAll(peerDir(dir, n), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Only a lock that is held counts, whatever number stands in the file.
func TestProcesses(t *testing.T) {
	dir := aRun(t, 1, 2, 10)
	if err := os.Mkdir(filepath.Join(dir, peersDir, newPeerDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(peerLock(dir, 2), []byte(strconv.Itoa(os.Getppid())), 0o644); err != nil {
		t.Fatal(err)
	}
	release, err := lockPeer(peerDir(dir, 10), 10)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := []PeerProcess{{1, false, 0}, {2, false, 0}, {10, true, os.Getpid()}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("%+v, want %+v", got, want)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if got, err = Processes(dir); err != nil || got[2].Running {
		t.Errorf("after the lock was given back: %+v, %v", got, err)
	}
	if _, err := Processes(t.TempDir()); err == nil || !strings.Contains(err.Error(), "no run folder") {
		t.Errorf("a folder that is no run: %v", err)
	}
}

// Those who ask whether a peer runs keep nobody from starting it.
func TestAskersKeepNobodyOut(t *testing.T) {
	dir := aRun(t, 1)
	over := make(chan struct{})
	var askers sync.WaitGroup
	for range 3 {
		askers.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
					if _, _, err := holder(peerLock(dir, 1)); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for range 500 {
		release, err := lockPeer(peerDir(dir, 1), 1)
		if err != nil {
			t.Error(err)
			break
		}
		if err := release(); err != nil {
			t.Error(err)
		}
	}
	close(over)
	askers.Wait()
}

func TestStopNothing(t *testing.T) {
	dir := aRun(t, 1, 2)
	got, err := StopPeers(t.Context(), dir, StopConfig{})
	if err != nil || len(got) != 2 || got[0].State != "absent" {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := StopPeers(t.Context(), dir, StopConfig{Peers: []int{3}}); err == nil || !strings.Contains(err.Error(), "no peer 3") {
		t.Errorf("a peer that is not there: %v", err)
	}
}

func TestLatestRun(t *testing.T) {
	parent := t.TempDir()
	if _, err := LatestRun(parent); err == nil || !strings.Contains(err.Error(), "no run") {
		t.Errorf("no run: %v", err)
	}
	now := time.Now()
	for i, name := range []string{"new", "old", "older"} {
		dir := filepath.Join(parent, name)
		file := filepath.Join(dir, eventsFile)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, now, now.Add(-time.Duration(i)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := LatestRun(parent); err != nil || filepath.Base(got) != "new" {
		t.Errorf("%q, %v", got, err)
	}
}
