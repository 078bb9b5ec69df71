package spirt

import (
	"context"
	"encoding/json"
	"errors"
	"github.com/spirt-ml/spirt/bill"
	"github.com/spirt-ml/spirt/events"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// eventsOf reads the events of a run.
func eventsOf(t testing.TB, dir string) []Event {
	t.Helper()
	tail, err := events.OpenTail(filepath.Join(dir, eventsFile))
	check(t, err)
	defer tail.Close()
	_, events, err := tail.Next()
	check(t, err)
	return events
}

// roundsOf returns the rounds that a peer reported, in order, and its last
// model.
func roundsOf(events []Event, peer int) (rounds []uint64, model string) {
	for _, e := range events {
		if e.Event == "round" && e.Peer == peer {
			rounds, model = append(rounds, e.Round), e.Model
		}
	}
	return rounds, model
}

// upTo returns the rounds lo to hi.
func upTo(lo, hi uint64) (rounds []uint64) {
	for r := lo; r <= hi; r++ {
		rounds = append(rounds, r)
	}
	return rounds
}

func alone(dir string) PeerConfig { return PeerConfig{Run: dir, Peer: 1, Executable: os.Args[0]} }

// smallJob is a job of one peer, whose rounds take little.
func smallJob(rounds int) Job {
	return Job{Peers: 1, Model: "logistic", Rounds: rounds, BatchSize: 8, BatchesPerRound: 2, CheckpointEvery: 4, ValidateEvery: 3}
}

func TestRunPeer(t *testing.T) {
	dir := runOf(t, smallJob(7))
	check(t, RunPeer(t.Context(), alone(dir)))
	events := eventsOf(t, dir)
	rounds, model := roundsOf(events, 1)
	if !slices.Equal(rounds, upTo(1, 7)) {
		t.Errorf("the rounds were %v", rounds)
	}
	var validated []uint64
	var invoked bill.Usage // since the round before
	for _, e := range events {
		switch e.Event {
		case "invocation":
			if i := e.Invocation; i == nil || i.Task != "gradient" && i.Task != "evaluate" || i.Attempt != 1 || i.Error != "" || i.BilledMS < 1 || i.MemoryMB != 256 || i.MS <= 0 {
				t.Errorf("%+v", e.Invocation)
			} else {
				invoked = invoked.Add(i.Usage())
			}
		case "finished":
			if e.Round != 7 || e.StopReason != "rounds" || e.Model != model {
				t.Errorf("%+v", e)
			}
		case "validation":
			validated = append(validated, e.Round)
			if e.Accuracy == nil || e.Loss == nil || *e.Accuracy < 0 || *e.Accuracy > 1 {
				t.Errorf("%+v", e)
			}
		case "round":
			if e.Loss == nil || *e.Loss <= 0 || !slices.Equal(e.Members, []int{1}) || e.How != "recomputed" || e.Degraded || e.Used == nil {
				t.Errorf("%+v", e)
			} else if want := 2 * int(e.Round); e.Used.Invocations < want || e.Used.Timeouts != 0 || e.Used.Bytes != 0 {
				t.Errorf("round %d: %+v", e.Round, *e.Used)
			}
			// What a round cost is what its events add up to.
			s := e.Spent
			if s == nil || len(e.Steps) == 0 || e.Samples != 2*smallJob(7).BatchSize {
				t.Fatalf("%+v", e)
			}
			u := invoked
			u.PeerMillis = s.PeerMillis
			if s.Usage != u || s.CostUSD != bill.Default().Cost(u).Total() || s.CostUSD == 0 {
				t.Errorf("round %d: spent %+v, its invocations say %+v", e.Round, *s, u)
			}
			invoked = bill.Usage{}
		default:
			t.Errorf("event %+v", e)
		}
		if e.Time.IsZero() || e.Peer != 1 {
			t.Errorf("%+v", e)
		}
	}
	if !slices.Equal(validated, []uint64{3, 6}) {
		t.Errorf("validated after the rounds %v", validated)
	}
	trained, err := ReadModel(filepath.Join(dir, modelFile))
	check(t, err)
	if trained.Hash().String() != model {
		t.Errorf("the model file has the hash %s, the events say %s", trained.Hash(), model)
	}

	// The same again is not more training, and ends with the same model.
	check(t, os.Remove(filepath.Join(dir, modelFile)))
	check(t, RunPeer(t.Context(), alone(dir)))
	if again, _ := roundsOf(eventsOf(t, dir), 1); !slices.Equal(again, rounds) {
		t.Errorf("started again at its end, the peer reports the rounds %v", again[len(rounds):])
	}
	trained, err = ReadModel(filepath.Join(dir, modelFile))
	check(t, err)
	if trained.Hash().String() != model {
		t.Errorf("started again the peer left the model %s, before %s", trained.Hash(), model)
	}
	e, err := Eval(dir, "")
	check(t, err)
	if e.Model != model || e.Samples != 2000 {
		t.Errorf("%+v", e)
	}

	// A job whose bits differ is another job: it does not go on from here.
	path := filepath.Join(dir, jobFile)
	b, err := os.ReadFile(path)
	check(t, err)
	check(t, os.WriteFile(path, []byte(strings.Replace(string(b), "rounds: 7", "rounds: 8", 1)), 0o644))
	refused(t, RunPeer(t.Context(), alone(dir)), jobFile, "restore the job file")
	check(t, os.Remove(path))
	other := runOf(t, smallJob(7))
	for _, name := range []string{genesisFile, rostersDir} { // with the same peer
		check(t, os.RemoveAll(filepath.Join(dir, name)))
		check(t, os.Rename(filepath.Join(other, name), filepath.Join(dir, name)))
	}
	key := filepath.Join(peerDir(dir, 1), keyFile)
	check(t, os.Remove(key))
	check(t, os.Rename(filepath.Join(peerDir(other, 1), keyFile), key))
	refused(t, RunPeer(t.Context(), alone(dir)), "of another job", databaseDir)
}

// runUntil runs the peer of a folder until it reports a round, then interrupts
// it.
func runUntil(t *testing.T, cfg PeerConfig, last uint64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	log, err := events.OpenLog(filepath.Join(cfg.Run, eventsFile)) // so that there is one to read
	check(t, err)
	check(t, log.Close())
	ended := make(chan error, 1)
	go func() { ended <- RunPeer(ctx, cfg) }()
	tail, err := events.OpenTail(filepath.Join(cfg.Run, eventsFile))
	check(t, err)
	defer tail.Close()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if !errors.Is(err, ErrInterrupted) {
				t.Fatalf("the peer ended with %v", err)
			}
			return
		case <-tick.C:
			_, events, err := tail.Next()
			check(t, err)
			for _, e := range events {
				if e.Event == "round" && e.Round >= last {
					cancel()
				}
			}
		}
	}
}

// A peer that is interrupted goes on where it was, and ends with the model of
// one that was not.
func TestInterruptedPeerGoesOn(t *testing.T) {
	const rounds = 30
	job := smallJob(rounds)
	undisturbed := runOf(t, job)
	check(t, RunPeer(t.Context(), alone(undisturbed)))
	_, want := roundsOf(eventsOf(t, undisturbed), 1)

	dir := runOf(t, job)
	for _, last := range []uint64{3, 9, 17} {
		runUntil(t, alone(dir), last)
		if _, err := os.Stat(filepath.Join(dir, modelFile)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("interrupted, the peer left a model: %v", err)
		}
	}
	check(t, RunPeer(t.Context(), alone(dir)))
	got, model := roundsOf(eventsOf(t, dir), 1)
	if !slices.Equal(got, upTo(1, rounds)) {
		t.Errorf("with interruptions the rounds were %v", got)
	}
	if model != want {
		t.Errorf("interrupted, the peer ended with the model %s, else with %s", model, want)
	}
	slots := map[uint64]bool{}
	for _, e := range eventsOf(t, dir) {
		if e.Event == "round" {
			if slots[e.Slot] {
				t.Errorf("two rounds in slot %d", e.Slot)
			}
			slots[e.Slot] = true
		}
	}
}

// A checkpoint that does not hold what it says is refused, not trained on.
func TestRecoverRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(p *peer, meta map[string]string)
		says  string
	}{
		"other record": {func(p *peer, meta map[string]string) {
			var r round.Record
			check(t, json.Unmarshal([]byte(meta["record"]), &r))
			r.Model[0]++
			b, err := json.Marshal(r)
			check(t, err)
			meta["record"] = string(b)
		}, "does not hold the state of its record"},
		"other parameters": {func(p *peer, meta map[string]string) {
			check(t, p.db.Copy(p.checkpointKeys(headName)[0], p.checkpointKeys(headName)[1])) // of another length
		}, "checkpoint"},
		"no record": {func(p *peer, meta map[string]string) { delete(meta, "record") }, "the record in the checkpoint"},
		"no job":    {func(p *peer, meta map[string]string) { delete(meta, "job") }, "of another job"},
	} {
		t.Run(name, func(t *testing.T) {
			job := smallJob(2)
			p, genesis := aPeer(t, job)
			check(t, p.leaveHead(genesis))
			meta, err := p.db.Recover(headName)
			check(t, err)
			meta = maps.Clone(meta)
			c.spoil(p, meta)
			check(t, p.db.Checkpoint(headName, p.checkpointKeys(headName), meta))
			_, err = p.recover()
			refused(t, err, c.says)
		})
	}
	t.Run("the last one is damaged", func(t *testing.T) {
		p, genesis := aPeer(t, smallJob(2))
		check(t, p.leaveHead(genesis))
		check(t, p.leaveHead(genesis))
		files, err := filepath.Glob(filepath.Join(p.dir, databaseDir, "*.ckpt"))
		check(t, err)
		for i := len(files) - 1; i >= 0; i-- {
			check(t, os.Truncate(files[i], 100))
			found, err := p.recover()
			switch {
			case i > 0 && (err != nil || len(found) != 1 || found[0].record.ID() != genesis.ID()):
				t.Errorf("the checkpoint before was not taken: %v", err)
			case i == 0 && err == nil:
				t.Error("started from genesis though there are checkpoints")
			}
		}
	})
}

// Without a watermark that can be written, nothing is signed: the peer ends.
func TestWatermarkCannotBeWritten(t *testing.T) {
	dir := runOf(t, smallJob(3))
	path := filepath.Join(peerDir(dir, 1), watermarkFile)
	p, err := openPeer(alone(dir))
	check(t, err)
	defer p.close()
	check(t, os.Mkdir(path, 0o755))
	refused(t, p.run(t.Context()), path)
	if rounds, _ := roundsOf(eventsOf(t, dir), 1); len(rounds) != 0 {
		t.Errorf("rounds without a watermark: %v", rounds)
	}
}

// A damaged watermark ends the peer before it signs anything.
func TestWatermarkRefused(t *testing.T) {
	dir := runOf(t, smallJob(3))
	path := filepath.Join(peerDir(dir, 1), watermarkFile)
	check(t, os.WriteFile(path, []byte("slot 1"), 0o644))
	refused(t, RunPeer(t.Context(), alone(dir)), path, "sign twice")
}

// A checkpoint that cannot be written is told, and does not end the training;
// the last one is missed, so that ends in an error, with the model there.
func TestCheckpointCannotBeWritten(t *testing.T) {
	dir := runOf(t, smallJob(9))
	p, err := openPeer(alone(dir))
	check(t, err)
	defer p.close()
	database := filepath.Join(p.dir, databaseDir)
	check(t, os.RemoveAll(database))
	check(t, os.WriteFile(database, nil, 0o644))
	refused(t, p.run(t.Context()), "checkpoint of round 9", database)
	events := eventsOf(t, dir)
	if rounds, _ := roundsOf(events, 1); !slices.Equal(rounds, upTo(1, 9)) {
		t.Errorf("the rounds were %v", rounds)
	}
	warned := false
	for _, e := range events {
		warned = warned || e.Event == "warning" && strings.Contains(e.Message, "checkpoint of round")
	}
	if !warned {
		t.Error("nobody was told of the checkpoint")
	}
	_, err = ReadModel(filepath.Join(dir, modelFile))
	check(t, err)
}

// What openPeer has begun is undone when it fails.
func TestOpenPeerRefuses(t *testing.T) {
	dir := runOf(t, smallJob(3))
	for _, n := range []int{-1, 0, 2} {
		cfg := alone(dir)
		cfg.Peer = n
		refused(t, RunPeer(t.Context(), cfg), "1 to 1")
	}
	cfg := alone(dir)
	cfg.Listen = "127.0.0.1:port"
	refused(t, RunPeer(t.Context(), cfg), "port")
	check(t, RunPeer(t.Context(), alone(dir))) // no lock, no socket is left
	cfg = alone(filepath.Join(dir, "none"))
	refused(t, RunPeer(t.Context(), cfg), "none")
}

// A peer leaves no goroutine behind, also when it is interrupted.
func TestRunPeerLeavesNothing(t *testing.T) {
	count := func() int {
		for range 1000 {
			runtime.Gosched()
		}
		return runtime.NumGoroutine()
	}
	dir := runOf(t, smallJob(1000))
	runUntil(t, alone(dir), 2) // what libraries start once
	before := count()
	for last := uint64(4); last <= 8; last += 2 {
		runUntil(t, alone(dir), last)
	}
	deadline := time.Now().Add(5 * time.Second)
	for count() > before && time.Now().Before(deadline) {
	}
	if after := count(); after > before {
		b := make([]byte, 1<<20)
		t.Errorf("%d goroutines before, %d after\n%s", before, after, b[:runtime.Stack(b, true)])
	}
}

func TestSources(t *testing.T) {
	for _, c := range []struct {
		self, peers int
		likely      []round.Peer
		want        []int
	}{
		{1, 1, nil, nil},
		{1, 4, nil, []int{1, 2, 3}},
		{3, 4, nil, []int{0, 1, 3}},
		{1, 4, []round.Peer{3}, []int{3, 1, 2}},
		{2, 4, []round.Peer{3, 0, 3}, []int{3, 0, 2}},
		{2, 4, []round.Peer{1, 2, 1}, []int{2, 0, 3}},
		{4, 5, []round.Peer{4, 2, 1, 0}, []int{4, 2, 1, 0}},
	} {
		job := smallJob(3)
		job.Peers = c.peers
		_, rosters, err := loadJob(runOf(t, job))
		check(t, err)
		p := &peer{n: c.self, ids: identities{rosters: rosters}}
		if got := p.sources(c.likely); !slices.Equal(got, c.want) {
			t.Errorf("peer %d of %d, likely %v: %v, want %v", c.self, c.peers, c.likely, got, c.want)
		}
	}
}

// Work that is replaced or not wanted gives no result, and is told to stop.
func TestBackgroundReplaced(t *testing.T) {
	p := &peer{loop: loop{results: make(chan result), stop: map[string]context.CancelFunc{}}}
	ctx, cancel := context.WithCancel(t.Context())
	closed := make(chan int, 3)
	work := func(n int) func(context.Context) result {
		return func(ctx context.Context) result {
			if n < 3 {
				<-ctx.Done()
			}
			return result{height: uint64(n), done: func() { closed <- n }}
		}
	}
	for n := 1; n <= 3; n++ {
		p.background(ctx, "compute", work(n))
	}
	for left := 3; left > 0; left-- {
		select {
		case n := <-closed:
			if n == 3 {
				t.Error("the last was dropped")
			}
		case r := <-p.loop.results:
			// One that was replaced may come in the moment of its end; it says so.
			if (r.height == 3) != (r.dropped() == nil) {
				t.Errorf("work %d: dropped %v", r.height, r.dropped())
			}
		}
	}
	p.background(ctx, "compute", work(4))
	cancel()
	p.loop.wg.Wait() // nobody takes the result
}
