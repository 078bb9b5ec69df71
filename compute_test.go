package spirt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// aPeer opens the only peer of a small job, with a real database and real
// functions, and does not run it.
func aPeer(t *testing.T, job Job) (p *peer, genesis round.Record) {
	t.Helper()
	job.Peers, job.Model = 1, "logistic"
	p, err := openPeer(PeerConfig{Run: runOf(t, job), Peer: 1, Executable: os.Args[0]})
	check(t, err)
	t.Cleanup(func() {
		if err := p.close(); err != nil {
			t.Error(err)
		}
	})
	return p, p.loop.head
}

// soleShares are the shares of aPeer.
func soleShares(p *peer) shares { return equalShares(1, p.job.BatchesPerRound) }

// dealtTo returns the rows of minibatch i of a peer at a record.
func dealtTo(t *testing.T, p *peer, parent round.Record, members shares, i int) []int {
	t.Helper()
	n, rows, err := p.computer.deal(parent, members)
	check(t, err)
	if i >= n {
		t.Fatalf("minibatch %d of %d", i, n)
	}
	return rows(i)
}

// warnings replaces where a computer warns.
func warnings(c *computer) func() []string {
	var mu sync.Mutex
	var said []string
	c.warn = func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		said = append(said, fmt.Sprintf(format, args...))
	}
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return said
	}
}

// spoil makes minibatches with any of these rows of the shard fail for good:
// their labels are of no class.
func spoil(t *testing.T, p *peer, rows []int) {
	t.Helper()
	key := p.store.key("train/labels")
	ref, err := p.db.Get(key)
	check(t, err)
	labels := append([]byte(nil), ref.Tensor().Data...)
	ref.Release()
	for _, r := range rows {
		labels[r] = 200
	}
	_, err = p.db.Set(key, tensor.Tensor{DType: tensor.Uint8, Shape: []int{len(labels)}, Data: labels})
	check(t, err)
}

// byHand computes the gradient of some minibatches of the round after a record
// and their mean.
func byHand(t *testing.T, p *peer, params []float32, parent round.Record, minibatches ...int) (mean []float32, loss float64) {
	t.Helper()
	train, _, _ := p.data.Split()
	ws := p.model.NewWorkspace(p.job.BatchSize)
	mean, grad := make([]float32, len(params)), make([]float32, len(params))
	for _, i := range minibatches {
		rows := dealtTo(t, p, parent, soleShares(p), i)
		x, labels := make([]float32, len(rows)*p.data.Stride()), make([]int32, len(rows))
		for j, r := range rows {
			at := train.Lo + r
			p.data.Floats(x[j*p.data.Stride():(j+1)*p.data.Stride()], dataset.Range{Lo: at, Hi: at + 1})
			labels[j] = int32(p.data.Labels[at])
		}
		clear(grad)
		l, _ := p.model.Gradient(grad, params, x, labels, ws)
		loss += l
		for k, g := range grad {
			mean[k] += g
		}
	}
	for k := range mean {
		mean[k] /= float32(len(minibatches))
	}
	return mean, loss / float64(len(minibatches))
}

func TestAverage(t *testing.T) {
	p, genesis := aPeer(t, Job{BatchSize: 8, BatchesPerRound: 5})
	params := floatsOf(t, p.store, treehash.Hash(genesis.Model))
	for _, height := range []uint64{1, 7} {
		parent := genesis
		parent.Height = height - 1
		if height > 1 { // the same parameters after more rounds
			_, _, err := p.store.putState(tensor.Bytes(params), make([]byte, 4*p.store.state), parent.Height)
			check(t, err)
		}
		avg, err := p.computer.average(t.Context(), height, parent, soleShares(p))
		check(t, err)
		mean, loss := byHand(t, p, params, parent, 0, 1, 2, 3, 4)
		if avg.hash != treehash.Sum(tensor.Bytes(mean)) {
			t.Errorf("round %d: the average is another than by hand", height)
		}
		if math.Abs(*avg.loss-loss) > 1e-12*loss {
			t.Errorf("round %d: the loss is %v, by hand %v", height, *avg.loss, loss)
		}
		avg.release()
	}
	if s := p.db.(*tensordb.DB).Stats(); s.Accumulators != 0 {
		t.Errorf("%d accumulators stay behind", s.Accumulators)
	}
}

// A minibatch whose function fails for good is left out and named, and the
// average is that of the others: divided by their number, not by all.
func TestAverageLeavesOut(t *testing.T) {
	p, genesis := aPeer(t, Job{BatchSize: 8, BatchesPerRound: 4})
	said := warnings(p.computer)
	spoil(t, p, dealtTo(t, p, genesis, soleShares(p), 1)[:1]) // of minibatch 1 in round 1
	avg, err := p.computer.average(t.Context(), 1, genesis, soleShares(p))
	check(t, err)
	mean, loss := byHand(t, p, floatsOf(t, p.store, treehash.Hash(genesis.Model)), genesis, 0, 2, 3)
	if avg.hash != treehash.Sum(tensor.Bytes(mean)) {
		t.Error("the average is not that of the minibatches that are left")
	}
	if math.Abs(*avg.loss-loss) > 1e-12*loss {
		t.Errorf("the loss is %v, by hand %v", *avg.loss, loss)
	}
	if w := said(); len(w) != 1 || !strings.Contains(w[0], "round 1, minibatch 1 is left out") || !strings.Contains(w[0], "200") {
		t.Errorf("warnings: %q", w)
	}
}

func TestAverageAllFail(t *testing.T) {
	p, genesis := aPeer(t, Job{BatchSize: 8, BatchesPerRound: 3})
	said := warnings(p.computer)
	train, _, _ := p.data.Split()
	all := make([]int, train.Len())
	for i := range all {
		all[i] = i
	}
	spoil(t, p, all)
	_, err := p.computer.average(t.Context(), 1, genesis, soleShares(p))
	refused(t, err, "label", "200")
	if n := len(said()); n != 3 {
		t.Errorf("%d warnings for 3 minibatches", n)
	}
	if s := p.db.(*tensordb.DB).Stats(); s.Accumulators != 0 || len(p.db.Keys(p.store.key("gradient/"))) != 0 {
		t.Error("an accumulator stays behind")
	}
	var failed *function.FunctionError
	if !errors.As(err, &failed) || !failed.Permanent() {
		t.Errorf("the cause is lost: %v", err)
	}
}

func TestAverageNotFinite(t *testing.T) {
	p, _ := aPeer(t, Job{BatchSize: 8, BatchesPerRound: 2})
	said := warnings(p.computer)
	params := make([]float32, p.store.params)
	params[3] = float32(math.NaN())
	model, state, err := p.store.putState(tensor.Bytes(params), make([]byte, 4*p.store.state), 0)
	check(t, err)
	_, err = p.computer.average(t.Context(), 1, round.Record{Model: round.Hash(model), State: round.Hash(state)}, soleShares(p))
	refused(t, err, "NotFinite")
	for _, w := range said() {
		if !strings.Contains(w, "minibatch") || !strings.Contains(w, "not finite") {
			t.Errorf("the warning %q does not name what is not finite", w)
		}
	}
	_, err = p.computer.average(t.Context(), 1, round.Record{Height: 9}, soleShares(p))
	refused(t, err, "the parameters after round 9")
	refused(t, p.computer.keepForValidation(round.Record{Height: 9}), "the parameters after round 9")
	_, err = p.computer.validate(t.Context(), round.Record{Height: 9})
	refused(t, err, "no such key")
}

// What a peer computes on follows from its shares: how many minibatches, and
// which rows of which samples.
func TestDeal(t *testing.T) {
	p, _ := aPeer(t, Job{BatchSize: 8, Shards: shardsEpoch})
	members := shares{{member: 0, minibatches: 3}, {member: 2, minibatches: 5}, {member: 4, minibatches: 2, private: true}, {member: 9, minibatches: 1}}
	for _, self := range []int{0, 2, 9} {
		p.computer.self = self
		own, before, err := members.of(self)
		check(t, err)
		order := dataset.Order{Seed: p.job.Seed, Len: 7000}
		for i := range own.minibatches {
			got := dealtTo(t, p, round.Record{Height: 11, Position: 11 * members.dealt()}, members, i)
			if want := order.Minibatch(11*9+before+uint64(i), 8); !slices.Equal(got, want) {
				t.Errorf("member %d, minibatch %d: rows %v, want %v", self, i, got, want)
			}
		}
	}
	p.computer.job.Shards, p.computer.self = shardsFixed, 2
	seen := map[int]bool{}
	for round0 := range uint64(200) {
		for i := range 5 {
			for _, row := range dealtTo(t, p, round.Record{Height: round0}, members, i) {
				seen[row] = true
				if lo, hi := 7000*3/9, 7000*8/9; row < lo || row >= hi {
					t.Fatalf("row %d is not of the part from %d to %d", row, lo, hi)
				}
			}
		}
	}
	if len(seen) != 7000*8/9-7000*3/9 {
		t.Errorf("%d rows of the part were visited", len(seen))
	}

	p.computer.self = 4
	_, _, err := p.computer.deal(round.Record{}, members)
	refused(t, err, "data of its own", "--data")
	p.computer.self = 5
	_, _, err = p.computer.deal(round.Record{}, members)
	refused(t, err, "peer 6 is not on the roster")
	p.computer.self = 0
	p.computer.train = 0
	_, _, err = p.computer.deal(round.Record{}, members)
	refused(t, err, "0 samples are too few", "shards epoch")
}

// idxFolder makes a data set of so many images of 28 x 28, whose pixels and
// labels are a function of their number.
func idxFolder(t *testing.T, images int, label func(i int) uint8) string {
	t.Helper()
	dir := t.TempDir()
	pixels, labels := []byte{0, 0, 8, 3}, []byte{0, 0, 8, 1}
	for _, dim := range []uint32{uint32(images), 28, 28} {
		pixels = binary.BigEndian.AppendUint32(pixels, dim)
	}
	labels = binary.BigEndian.AppendUint32(labels, uint32(images))
	for i := range images {
		for j := range 28 * 28 {
			pixels = append(pixels, byte(i*31+j))
		}
		labels = append(labels, label(i))
	}
	check(t, os.WriteFile(filepath.Join(dir, "images-idx3-ubyte"), pixels, 0o644))
	check(t, os.WriteFile(filepath.Join(dir, "labels-idx1-ubyte"), labels, 0o644))
	return dir
}

// A peer that brings data of its own trains on all of that, and on the job's
// pixels' scale, and validates on the job's.
func TestOwnData(t *testing.T) {
	job := Job{Peers: 1, Model: "logistic", BatchSize: 8, BatchesPerRound: 2}
	dir := idxFolder(t, 20, func(i int) uint8 { return uint8(i % 10) })
	p, err := openPeer(PeerConfig{Run: runOf(t, job), Peer: 1, Executable: os.Args[0], Data: "idx:" + dir})
	check(t, err)
	t.Cleanup(func() { check(t, p.close()) })
	genesis := p.loop.head
	_, err = p.computer.average(t.Context(), 1, genesis, soleShares(p))
	refused(t, err, "data of its own", "without --data")

	members := shares{{member: 0, minibatches: 5, private: true}, {member: 1, minibatches: 7}}
	var rows []int
	for i := range 5 {
		rows = append(rows, dealtTo(t, p, genesis, members, i)...)
	}
	for epoch := range slices.Chunk(rows, 20) {
		slices.Sort(epoch)
		for i, r := range epoch {
			if r != i {
				t.Fatalf("an epoch of its own holds %v", epoch)
			}
		}
	}
	avg, err := p.computer.average(t.Context(), 1, genesis, members)
	check(t, err)
	defer avg.release()
	params, mean, loss := floatsOf(t, p.store, treehash.Hash(genesis.Model)), make([]float32, p.store.params), 0.0
	own := *p.own
	own.Scale, own.Offset = p.data.Scale, p.data.Offset
	ws := p.model.NewWorkspace(8)
	for i := range 5 {
		rows := dealtTo(t, p, genesis, members, i)
		x, labels, grad := make([]float32, 8*own.Stride()), make([]int32, 8), make([]float32, len(params))
		for j, r := range rows {
			own.Floats(x[j*own.Stride():(j+1)*own.Stride()], dataset.Range{Lo: r, Hi: r + 1})
			labels[j] = int32(own.Labels[r])
		}
		l, _ := p.model.Gradient(grad, params, x, labels, ws)
		loss += l / 5
		for k, g := range grad {
			mean[k] += g
		}
	}
	for k := range mean {
		mean[k] /= 5
	}
	if avg.hash != treehash.Sum(tensor.Bytes(mean)) || math.Abs(*avg.loss-loss) > 1e-12*loss {
		t.Errorf("the average is another than by hand; the loss %v, by hand %v", *avg.loss, loss)
	}
	check(t, p.computer.keepForValidation(genesis))
	v, err := p.computer.validate(t.Context(), genesis)
	check(t, err)
	if v.Count != 1000 {
		t.Errorf("validated on %d samples", v.Count)
	}
}

func TestOwnDataRefuses(t *testing.T) {
	run := runOf(t, Job{Peers: 1, Model: "logistic", BatchSize: 8})
	eleven := idxFolder(t, 20, func(i int) uint8 { return uint8(i % 11) })
	for name, says := range map[string][]string{
		"mnist-10k":          {"own data", "is the job's"},
		"idx:" + t.TempDir(): {"own data", "no file *images*idx3*"},
		"idx:" + eleven:      {"own data", "label 10 of image 10", "10 classes"},
		"idx:" + idxFolder(t, 7, func(int) uint8 { return 0 }): {"own data", "7 samples", "one minibatch of 8"},
	} {
		_, err := openPeer(PeerConfig{Run: run, Peer: 1, Executable: os.Args[0], Data: name})
		refused(t, err, says...)
	}
}

// byEvaluation checks a result against an evaluation of the model by hand.
func byEvaluation(t *testing.T, p *peer, v round.Validation, model round.Record) {
	t.Helper()
	trained := Trained{Model: p.model, Parameters: floatsOf(t, p.store, treehash.Hash(model.Model)), Scale: p.data.Scale, Offset: p.data.Offset}
	_, rows, _ := p.data.Split()
	accuracy, loss, err := trained.Evaluate(p.data, rows)
	check(t, err)
	if int(v.Count) != rows.Len() || float64(v.Correct)/float64(v.Count) != accuracy || math.Abs(float64(v.LossMicro)/1e6-loss) > 2e-6 {
		t.Errorf("%+v, by hand accuracy %v and loss %v", v, accuracy, loss)
	}
}

func TestValidate(t *testing.T) {
	p, genesis := aPeer(t, Job{BatchSize: 8})
	check(t, p.computer.keepForValidation(genesis))
	v, err := p.computer.validate(t.Context(), genesis)
	check(t, err)
	byEvaluation(t, p, v, genesis)
}

// chainOf returns records from one height on, each the parent of the next, with
// the states of other parameters each.
func chainOf(t *testing.T, p *peer, seed, from uint64, n int) []round.Record {
	t.Helper()
	chain := make([]round.Record, n)
	for i := range chain {
		height := from + uint64(i)
		model, state, err := p.store.putState(tensor.Bytes(random(seed+height, p.store.params)), make([]byte, 4*p.store.state), height)
		check(t, err)
		chain[i] = round.Record{Height: height, Model: model, State: state}
		if i > 0 {
			chain[i].Parent = chain[i-1].ID()
		}
	}
	return chain
}

// A result is announced for the model that it is of, and only on the chain that
// goes on from there.
func TestValidateFollowsChain(t *testing.T) {
	p, _ := aPeer(t, Job{BatchSize: 8, ValidateEvery: 10, Rounds: 25})
	// along tells the machine's parents one by one, and returns the results by
	// the round in whose announcement they stand.
	along := func(chain ...round.Record) map[uint64]round.Validation {
		found := map[uint64]round.Validation{}
		for _, r := range chain {
			if v := p.validate(t.Context(), r); v != nil {
				<-v.done
				found[r.Height+1] = v.result
			}
		}
		return found
	}
	defer p.loop.wg.Wait()
	chain, other := chainOf(t, p, 0, 5, 20), chainOf(t, p, 99, 5, 20)
	twice := append(slices.Clone(chain[:8]), chain[7:]...) // a slot that is tried again
	v := along(twice...)
	if len(v) != 2 {
		t.Fatalf("results in the rounds %v", v)
	}
	byEvaluation(t, p, v[18], chain[5])
	byEvaluation(t, p, v[25], chain[15]) // the last round, though less than eight are over
	if v := along(chain[6:15]...); len(v) != 0 {
		t.Errorf("begun after the model's record: %v", v)
	}
	if v := along(append(slices.Clone(chain[5:8]), chain[9:15]...)...); len(v) != 0 {
		t.Errorf("a record is missing in between: %v", v)
	}
	if v := along(append(slices.Clone(chain[5:9]), other[9:15]...)...); len(v) != 0 {
		t.Errorf("on another branch: %v", v)
	}
	v = along(append(slices.Clone(chain[5:9]), other[5:15]...)...)
	if len(v) != 1 {
		t.Fatalf("results in the rounds %v", v)
	}
	byEvaluation(t, p, v[18], other[5])
	p.loop.wg.Wait()
	if keys := p.db.Keys(p.store.key("validation/")); len(keys) != 2 { // images and labels
		t.Errorf("left: %v", keys)
	}
}

// hanging makes the computer's functions ones that never answer; each connects
// to the listener when it is invoked.
func hanging(t *testing.T, p *peer, concurrency int) net.Listener {
	t.Helper()
	invoked, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { invoked.Close() })
	platform, err := function.New(function.Config{
		Name: "hanging", Command: []string{os.Args[0]}, Env: []string{hangVariable + "=" + invoked.Addr().String()},
		Concurrency: concurrency, MemoryMB: 256, Timeout: time.Minute, Retries: -1, Isolation: function.Isolation{Off: true},
	})
	check(t, err)
	t.Cleanup(func() { platform.Close() })
	p.computer.platform = platform
	return invoked
}

// A computation that is not wanted any more ends at once, though its functions
// hang, and leaves nothing in the database.
func TestAverageCancelled(t *testing.T) {
	const window = 2
	p, genesis := aPeer(t, Job{BatchSize: 8, BatchesPerRound: 40, Functions: Functions{Concurrency: window}})
	said := warnings(p.computer)
	invoked := hanging(t, p, 8)
	ctx, cancel := context.WithCancelCause(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := p.computer.average(ctx, 1, genesis, soleShares(p))
		ended <- err
	}()
	for range window {
		conn, err := invoked.Accept()
		check(t, err)
		defer conn.Close()
	}
	// There is room for more instances, but a gradient that comes early is
	// held in the database: so no more are begun.
	if n := p.computer.platform.Stats().Instances; n > window {
		t.Errorf("%d minibatches are under way, want %d", n, window)
	}
	cancel(errors.New("not wanted"))
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	if w := said(); len(w) != 0 {
		t.Errorf("warnings about what nobody wants: %q", w)
	}
	if s := p.db.(*tensordb.DB).Stats(); s.Accumulators != 0 {
		t.Error("an accumulator stays behind")
	}
	cancelled, stop := context.WithCancel(t.Context())
	stop()
	if _, err := p.computer.average(cancelled, 1, genesis, soleShares(p)); !errors.Is(err, context.Canceled) {
		t.Errorf("begun when cancelled, it ended with %v", err)
	}
}
