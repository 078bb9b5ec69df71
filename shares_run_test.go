package spirt

import (
	"context"
	"crypto/ed25519"
	"errors"
	"github.com/spirt-ml/spirt/events"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/membership"
)

// runWith makes the folder of a run with these members, and returns what signs
// the next roster.
func runWith(t *testing.T, job Job, members ...membership.Member) (dir string, sign func(change func(r *membership.Roster)) *membership.Roster) {
	t.Helper()
	job.Peers = len(members)
	check(t, job.Resolve())
	dir = filepath.Join(t.TempDir(), "run")
	check(t, os.Mkdir(dir, 0o755))
	g, admin, err := createJob(dir, job)
	check(t, err)
	last := g.First()
	last.Start, last.F = true, uint16(job.Byzantine)
	for i, m := range members {
		key, err := createIdentity(peerDir(dir, i+1))
		check(t, err)
		m.Key = key.Public().(ed25519.PublicKey)
		last.Add(m)
	}
	check(t, last.Sign(g, admin))
	check(t, writeRoster(dir, last))
	return dir, func(change func(r *membership.Roster)) *membership.Roster {
		last = last.Successor()
		change(last)
		check(t, last.Sign(g, admin))
		return last
	}
}

// Three peers of unlike speed, one with data of its own, train as one. Then a
// roster gives the slow one more to do: all follow it from the same record on.
func TestRunWithShares(t *testing.T) {
	job := Job{Model: "logistic", BatchSize: 8, Rounds: 100_000, ValidateEvery: 100_000, CheckpointEvery: 1000}
	dir, sign := runWith(t, job, membership.Member{Minibatches: 1}, membership.Member{}, membership.Member{Minibatches: 4, Private: true})
	own := "idx:" + idxFolder(t, 50, func(i int) uint8 { return uint8(i % 10) })
	minibatches := [][2]int{{1, 3}, {1, 1}, {4, 4}} // before and after

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 3)
	var peers []*peer
	for n := 1; n <= 3; n++ {
		cfg := PeerConfig{Run: dir, Peer: n, Executable: os.Args[0]}
		if n == 3 {
			cfg.Data = own
		}
		p, err := openPeer(cfg)
		check(t, err)
		peers = append(peers, p)
	}
	for _, p := range peers {
		go func() { ended <- errors.Join(p.run(ctx), p.close()) }()
	}
	tail, err := events.OpenTail(filepath.Join(dir, eventsFile))
	check(t, err)
	defer tail.Close()
	var events []Event
	await := func(what string, enough func() bool) {
		t.Helper()
		for !enough() {
			select {
			case err := <-ended:
				t.Fatalf("a peer ended before %s: %v", what, err)
			default:
			}
			check(t, wait(t.Context(), 10*time.Millisecond))
			_, more, err := tail.Next()
			check(t, err)
			events = append(events, more...)
		}
	}
	reached := func(round uint64) func() bool {
		return func() bool {
			for n := 1; n <= 3; n++ {
				if !slices.ContainsFunc(events, func(e Event) bool { return e.Event == "round" && e.Peer == n && e.Round >= round }) {
					return false
				}
			}
			return true
		}
	}
	await("round 10", reached(10))
	// One peer has the roster; the others hear of it.
	_, err = peers[1].ids.rosters.add(sign(func(r *membership.Roster) { r.Members[0].Minibatches = 3 }))
	check(t, err)
	var changed uint64
	await("the roster changed", func() bool {
		for _, e := range events {
			if e.Event == "roster" {
				changed = e.Round
			}
		}
		return changed > 0
	})
	await("ten rounds under it", reached(changed+10))
	cancel()
	for range 3 {
		if err := <-ended; !errors.Is(err, ErrInterrupted) {
			t.Errorf("a peer ended with %v", err)
		}
	}
	_, more, err := tail.Next()
	check(t, err)
	events = append(events, more...)

	// What a peer's functions did from the first round of a phase to its last.
	// They are counted as they end, which may be after the round.
	type phase struct{ first, last Event }
	var phases [3][2]phase // by peer; before and after the change
	models := map[uint64]string{}
	for _, e := range events {
		switch {
		case e.Event == "roster" && e.Round != changed:
			t.Errorf("peer %d changes its roster in round %d, another in %d", e.Peer, e.Round, changed)
		case e.Event == "warning" && strings.Contains(e.Message, "no gradient"):
			t.Errorf("peer %d warns: %s", e.Peer, e.Message)
		}
		if e.Event != "round" {
			continue
		}
		if other, ok := models[e.Round]; ok && other != e.Model {
			t.Errorf("round %d has two models", e.Round)
		}
		models[e.Round] = e.Model
		p := &phases[e.Peer-1][0]
		if e.Round > changed {
			p = &phases[e.Peer-1][1]
		}
		if p.first.Round == 0 {
			p.first = e
		}
		p.last = e
	}
	for i, both := range phases {
		for j, p := range both {
			rounds, want := int(p.last.Round-p.first.Round), minibatches[i][j]
			got := p.last.Used.Invocations - p.first.Used.Invocations
			if got < want*rounds-want || got > want*rounds+rounds/2+want {
				t.Errorf("peer %d computed %d minibatches in the rounds %d to %d, want %d in each", i+1, got, p.first.Round+1, p.last.Round, want)
			}
		}
	}
}
