package spirt

import (
	"bytes"
	"github.com/spirt-ml/spirt/events"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/spirt-ml/spirt/function/gradient"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/p2p"
	"github.com/spirt-ml/spirt/tensor"
)

// runOf makes the folder of a run of this job.
func runOf(t testing.TB, job Job) string {
	t.Helper()
	check(t, job.Resolve())
	dir := filepath.Join(t.TempDir(), "run")
	check(t, createRun(dir, job))
	return dir
}

// What a function says of a validation goes into signed messages, where the
// impossible would end the peer.
func TestImpossibleValidation(t *testing.T) {
	good := gradient.Result{Loss: 0.25, Correct: 900, Samples: 1000}
	v, err := validated(good, 1000)
	check(t, err)
	if want := (round.Validation{LossMicro: 250_000, Correct: 900, Count: 1000}); v != want {
		t.Errorf("validation is %+v, want %+v", v, want)
	}
	for name, spoil := range map[string]func(r *gradient.Result){
		"loss -1":          func(r *gradient.Result) { r.Loss = -1 },
		"loss 1e308":       func(r *gradient.Result) { r.Loss = 1e308 },
		"loss NaN":         func(r *gradient.Result) { r.Loss = math.NaN() },
		"correct -1":       func(r *gradient.Result) { r.Correct = -1 },
		"too many right":   func(r *gradient.Result) { r.Correct = 1001 },
		"no samples":       func(r *gradient.Result) { r.Correct, r.Samples = 0, 0 },
		"far more samples": func(r *gradient.Result) { r.Samples += 1 << (strconv.IntSize / 2) },
		"too few samples":  func(r *gradient.Result) { r.Samples = 999 },
	} {
		r := good
		spoil(&r)
		if v, err := validated(r, 1000); err == nil {
			t.Errorf("%s: accepted as %+v", name, v)
		}
	}
}

// A member that announces another's average by its hash, but with a wrong
// size, must not have that average refused.
func TestAverageAnnouncedWithWrongSize(t *testing.T) {
	dir := runOf(t, Job{Peers: 2, Model: "logistic", Rounds: 1})
	var peers [2]*peer
	for i := range peers {
		p, err := openPeer(PeerConfig{Run: dir, Peer: i + 1, Executable: os.Args[0]})
		check(t, err)
		defer func() { check(t, p.close()) }()
		peers[i] = p
	}
	check(t, peers[1].host.SetAddresses(0, peers[0].host.Addrs()))
	for connected := false; !connected; {
		_, connected = (<-peers[1].host.Events()).(p2p.Connected)
	}
	average := make([]float32, peers[0].store.params)
	average[0] = 1
	data := tensor.Bytes(average)
	h := treehash.Sum(data)
	draft, err := peers[0].db.Draft(tensor.Float32, len(average))
	check(t, err)
	copy(draft.Data(), data)
	check(t, peers[0].store.putAverage(h, draft))

	r := peers[1].fetch(t.Context(), round.Fetch{Peer: 0, Gradient: round.Hash(h), Bytes: 4, Holders: []round.Peer{0}})
	if want := (round.BodyReady{Peer: 0, Gradient: round.Hash(h)}); r.err != nil || r.event != want {
		t.Errorf("got %+v, %v, want %+v", r.event, r.err, want)
	}
}

// A peer whose database is full goes on without what does not fit.
func TestFetchWithoutMemory(t *testing.T) {
	p, err := openPeer(PeerConfig{Run: runOf(t, Job{Peers: 1, Model: "logistic", Rounds: 1}), Peer: 1, Executable: os.Args[0]})
	check(t, err)
	defer func() { check(t, p.close()) }()
	for { // fill it
		draft, err := p.db.Draft(tensor.Float32, p.store.params)
		if err != nil {
			break
		}
		defer draft.Discard()
	}
	r := p.fetch(t.Context(), round.Fetch{Gradient: round.Hash{1}, Bytes: uint64(4 * p.store.params)})
	if _, ok := r.event.(round.BodyUnavailable); !ok || r.err != nil {
		t.Errorf("got %+v, %v, want that the body cannot be had", r.event, r.err)
	}
}

// A member that signs conflicting messages without end fills neither the
// events nor the log.
func TestReportsAreBounded(t *testing.T) {
	var log bytes.Buffer
	dir := t.TempDir()
	p := &peer{n: 1, log: slog.New(slog.NewTextHandler(&log, nil))}
	var err error
	p.events, err = events.OpenLog(filepath.Join(dir, eventsFile))
	check(t, err)
	defer p.events.Close()
	conflict := round.Report{Kind: round.Conflict, Peer: 1, Text: "peer 2 signed two different messages"}
	for range 2 * maxWarnings {
		p.report(conflict)
	}
	written := func() int64 {
		info, err := os.Stat(filepath.Join(dir, eventsFile))
		check(t, err)
		return info.Size() + int64(log.Len())
	}
	before := written()
	for range maxWarnings {
		p.report(conflict)
	}
	if after := written(); after != before {
		t.Errorf("%d more conflicts wrote %d bytes", maxWarnings, after-before)
	}
	p.report(round.Report{Kind: round.SlotFailed, Text: "of its own"})
	if written() == before {
		t.Error("what is not another's doing is not in the log any more")
	}
}

// A member that tells some one thing and others another is expelled within
// one round, by name and with the proof, and the run is none the worse.
func TestEquivocatorIsExpelled(t *testing.T) {
	job := Job{Peers: 4, Model: "logistic", Rounds: 120, CheckpointEvery: 20}
	dir := runOf(t, job)
	liar, err := openPeer(PeerConfig{Run: dir, Peer: 4, Executable: os.Args[0]})
	check(t, err)
	defer func() { check(t, liar.close()) }()
	ended := make(chan error, 3)
	for n := 1; n <= 3; n++ {
		go func() { ended <- RunPeer(t.Context(), PeerConfig{Run: dir, Peer: n, Executable: os.Args[0]}) }()
	}
	for connected := 0; connected < 3; {
		switch (<-liar.host.Events()).(type) {
		case p2p.Connected:
			connected++
		case p2p.Disconnected:
			connected--
		}
	}
	for _, g := range []string{"one thing", "another"} {
		check(t, liar.broadcast(round.Message{
			From: 3, Slot: 1, Parent: liar.loop.head.ID(), Roster: liar.loop.head.Roster,
			Body: round.Announce{Gradient: treehash.Sum([]byte(g)), Bytes: 4, BaseModel: liar.loop.head.Model},
		}))
	}
	told := make(chan bool, 1)
	go func() { // what is said to it is read, until it is closed
		for e := range liar.host.Events() {
			if m, ok := e.(p2p.Message); ok {
				opened, err := liar.take(m)
				if proof, ok := opened.Body.(round.Proof); ok && err == nil && proof.Peer == 3 && len(told) == 0 {
					told <- true
				}
			}
		}
	}()
	for range 3 {
		check(t, <-ended)
	}
	if len(told) == 0 {
		t.Error("the liar was not given the proof")
	}
	events, models := eventsOf(t, dir), map[string]bool{}
	for n := 1; n <= 3; n++ {
		expelled, last := false, Event{}
		for _, e := range events {
			if e.Event == "peer" && e.By == n && e.Peer == 4 && e.State == "expelled" {
				expelled = true
			}
			if e.Event == "round" && e.Peer == n {
				last = e
				if slices.Contains(e.Members, 4) {
					t.Errorf("round %d of peer %d contains the liar", e.Round, n)
				}
				if e.Round > 1 && !expelled {
					t.Errorf("peer %d is in round %d and has not expelled the liar", n, e.Round)
				}
			}
		}
		if last.Round != 120 || len(last.Members) != 3 {
			t.Errorf("peer %d ended at round %d with %v", n, last.Round, last.Members)
		}
		models[last.Model] = true
	}
	if len(models) != 1 {
		t.Errorf("the models differ: %v", models)
	}
	final := slices.ContainsFunc(events, func(e Event) bool { return e.Event == "final" && e.Round >= 20 })
	if !final {
		t.Error("nothing became final among the three others")
	}
}
