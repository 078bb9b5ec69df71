package tensordb

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

func open(t testing.TB, config Config) *DB {
	t.Helper()
	db, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func newRand(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func set(t testing.TB, db *DB, key string, f []float32) uint64 {
	t.Helper()
	v, err := db.Set(key, tensor.FromFloats([]int{len(f)}, f))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// get returns a copy of the numbers of key.
func get(t testing.TB, db *DB, key string) []float32 {
	t.Helper()
	ref, err := db.Get(key)
	if err != nil {
		t.Fatal(err)
	}
	defer ref.Release()
	return slices.Clone(tensor.Floats(ref.Tensor().Data))
}

func constant(n int, x float32) []float32 { return numbers(n, func(int) float32 { return x }) }

func wantError(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func TestVersionsAndReferences(t *testing.T) {
	db := open(t, Config{})
	v1 := set(t, db, "a", constant(2000, 1))
	old, err := db.Get("a")
	if err != nil {
		t.Fatal(err)
	}
	v2 := set(t, db, "a", constant(2000, 2))
	set(t, db, "b", constant(2000, 3)) // would take the first's buffer if it were free
	if v2 <= v1 || old.Version() != v1 {
		t.Fatalf("versions %d, %d", v1, v2)
	}
	if f := tensor.Floats(old.Tensor().Data); slices.Max(f) != 1 || slices.Min(f) != 1 {
		t.Fatal("a version changed while it was referenced")
	}
	old.Release()
	old.Release() // does nothing
	if get(t, db, "a")[0] != 2 {
		t.Fatal("releasing an old version hurt the new one")
	}

	if err := db.Copy("c", "a"); err != nil {
		t.Fatal(err)
	}
	used := db.Stats().MemoryUsed
	set(t, db, "a", constant(2000, 9))
	if get(t, db, "c")[0] != 2 || db.Stats().MemoryUsed <= used {
		t.Fatal("a copy changed with its source")
	}
	if err := db.Rename("d", "c"); err != nil {
		t.Fatal(err)
	}
	if err := db.Rename("d", "d"); err != nil {
		t.Fatal(err)
	}
	if err := db.Copy("d", "d"); err != nil {
		t.Fatal(err)
	}
	if db.Exists("c") || get(t, db, "d")[1999] != 2 {
		t.Fatal("rename")
	}
	if keys := db.Keys(""); !slices.Equal(keys, []string{"a", "b", "d"}) {
		t.Fatalf("keys %v", keys)
	}
	if n := db.Delete("a", "b", "d", "x"); n != 3 {
		t.Fatalf("deleted %d", n)
	}
	if s := db.Stats(); s.MemoryUsed != 0 || s.Keys != 0 {
		t.Fatalf("after all is deleted: %+v", s)
	}
	_, err = db.Get("a")
	wantError(t, err, ErrNoKey)
	wantError(t, db.Copy("x", "a"), ErrNoKey)
	wantError(t, db.Rename("x", "a"), ErrNoKey)
	_, err = db.Set("", tensor.FromFloats([]int{0}, nil))
	wantError(t, err, ErrOutOfRange)
	_, err = db.Set("x", tensor.Tensor{DType: tensor.Float32, Shape: []int{2}, Data: make([]byte, 7)})
	wantError(t, err, ErrWrongType)
	db.Close()
	_, err = db.Set("x", tensor.FromFloats([]int{0}, nil))
	wantError(t, err, ErrClosed)
	_, err = db.Get("x")
	wantError(t, err, ErrClosed)
}

// TestReadersSeeWholeVersions lets readers run against a writer and an
// optimizer: all numbers of what they see are one number.
func TestReadersSeeWholeVersions(t *testing.T) {
	db := open(t, Config{})
	const n, writes = 5000, 200
	set(t, db, "p", constant(n, 0))
	set(t, db, "g", constant(n, 1))
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 3 {
		wg.Go(func() {
			last := uint64(0)
			for {
				select {
				case <-stop:
					return
				default:
				}
				ref, err := db.Get("p")
				if err != nil {
					t.Error(err)
					return
				}
				f := tensor.Floats(ref.Tensor().Data)
				if slices.Min(f) != slices.Max(f) || ref.Version() < last {
					t.Error("half an update was seen")
				}
				last = ref.Version()
				ref.Release()
			}
		})
	}
	for i := range writes {
		if i%2 == 0 {
			set(t, db, "p", constant(n, float32(i)))
		} else if _, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, uint64(i/2+1), optim.Config{Name: "sgd", LR: 0.5, Momentum: 0.9}); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

func TestMemoryLimit(t *testing.T) {
	const size = 1 << 20
	db := open(t, Config{MaxMemory: 3*size + 8*overhead})
	for _, key := range []string{"a", "b", "c"} {
		set(t, db, key, constant(size/4, 1))
	}
	before := db.Stats()
	_, err := db.Set("d", tensor.FromFloats([]int{size / 4}, constant(size/4, 1)))
	wantError(t, err, ErrMemory)
	if !strings.Contains(err.Error(), "raise") {
		t.Errorf("the error does not say how to mend it: %v", err)
	}
	if db.Stats() != before {
		t.Fatal("a refused write changed something")
	}
	db.Delete("a")
	if s := db.Stats(); s.MemoryFree == 0 {
		t.Fatalf("nothing is kept for reuse: %+v", s)
	}
	// A buffer in reserve makes room for one of another size.
	set(t, db, "d", constant(size/4-size/32, 1))
	if s := db.Stats(); s.MemoryUsed+s.MemoryFree > s.MemoryLimit {
		t.Fatalf("over the limit: %+v", s)
	}
	if _, err := Open(Config{MaxMemory: -1}); err == nil {
		t.Error("a negative limit is accepted")
	}
}

func TestSizeClass(t *testing.T) {
	for _, n := range []int{0, 1, 8, 4095, 4096, 4097, 246824, 45 << 20, 1<<30 + 1} {
		c := sizeClass(n)
		if c < n || c%8 != 0 || n >= pooledMin && c-n > n/8 || sizeClass(c) != c {
			t.Errorf("size class of %d is %d", n, c)
		}
	}
}

func TestRows(t *testing.T) {
	db := open(t, Config{})
	data := []byte{0, 1, 2, 3, 4, 5}
	if _, err := db.Set("x", tensor.Tensor{DType: tensor.Uint8, Shape: []int{3, 1, 2}, Data: data}); err != nil {
		t.Fatal(err)
	}
	got, err := db.Rows([]byte{9}, "x", []int{2, 0, 2})
	if err != nil || !bytes.Equal(got, []byte{9, 4, 5, 0, 1, 4, 5}) {
		t.Fatalf("%v, %v", got, err)
	}
	for _, row := range []int{-1, 3} {
		_, err := db.Rows(nil, "x", []int{0, row})
		wantError(t, err, ErrOutOfRange)
	}
	db.Set("scalar", tensor.Tensor{DType: tensor.Uint8, Data: []byte{1}})
	_, err = db.Rows(nil, "scalar", []int{0})
	wantError(t, err, ErrWrongType)
	_, err = db.Rows(nil, "none", nil)
	wantError(t, err, ErrNoKey)
}

// TestAccumulateOrder sends gradients in random order, some twice, some
// skipped, within the window: the average is, bit for bit, the mean in
// minibatch order of those that were not skipped.
func TestAccumulateOrder(t *testing.T) {
	rng := newRand(t)
	for range 50 {
		db := open(t, Config{})
		n, minibatches := 1+rng.IntN(50), 1+rng.IntN(12)
		window := rng.IntN(minibatches + 1)
		gradients := make([][]float32, minibatches)
		skip := make([]bool, minibatches)
		var keys []string
		for i := range gradients {
			gradients[i] = numbers(n, func(int) float32 { return float32(rng.NormFloat64() * 1e3) })
			skip[i] = rng.IntN(5) == 0
			if !skip[i] {
				key := string(rune('a' + i))
				set(t, db, key, gradients[i])
				keys = append(keys, key)
			}
		}
		if err := db.Accumulator("acc", n, minibatches, window); err != nil {
			t.Fatal(err)
		}
		done := make([]bool, minibatches)
		for slices.Contains(done, false) {
			i := rng.IntN(minibatches)
			next := slices.Index(done, false)
			if skip[i] && !done[i] {
				if err := db.Skip("acc", i); err != nil {
					t.Fatal(err)
				}
				done[i] = true
				continue
			}
			switch status, err := db.Accumulate("acc", i, gradients[i]); {
			case skip[i] || i > next+window:
				wantError(t, err, ErrOutOfRange)
			case done[i]:
				if err != nil || status != Duplicate {
					t.Fatalf("again: %v, %v", status, err)
				}
			default:
				if err != nil || (status == Counted) != (i == next) {
					t.Fatalf("minibatch %d, next %d: %v, %v", i, next, status, err)
				}
				done[i] = true
			}
			db.accumulators["acc"].mu.Lock()
			if early := len(db.accumulators["acc"].early); early > window {
				t.Fatalf("%d gradients are buffered, the window is %d", early, window)
			}
			db.accumulators["acc"].mu.Unlock()
		}
		counted, err := db.Average("average", "acc")
		if len(keys) == 0 {
			wantError(t, err, ErrIncomplete)
			continue
		}
		if err != nil || counted != len(keys) {
			t.Fatalf("counted %d of %d, %v", counted, len(keys), err)
		}
		if err := db.Mean("mean", keys, nil); err != nil {
			t.Fatal(err)
		}
		a, _ := db.Hash("average")
		m, _ := db.Hash("mean")
		if a != m {
			t.Fatal("the average is not the mean in minibatch order")
		}
		if again, err := db.Average("average", "acc"); err != nil || again != counted {
			t.Fatalf("averaged again: %d, %v", again, err)
		}
		db.Delete(append(keys, "acc", "average", "mean")...)
		if s := db.Stats(); s.MemoryUsed != 0 {
			t.Fatalf("leaked: %+v", s)
		}
	}
}

func TestAccumulateRefuses(t *testing.T) {
	db := open(t, Config{})
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	for _, bad := range [][3]int{{0, 1, 0}, {1, 0, 0}, {1, 1, -1}, {1, maxMinibatches + 1, 0}} {
		wantError(t, db.Accumulator("acc", bad[0], bad[1], bad[2]), ErrOutOfRange)
	}
	if err := db.Accumulator("acc", 20, 3, 1); err != nil {
		t.Fatal(err)
	}
	_, err := db.Accumulate("none", 0, constant(20, 1))
	wantError(t, err, ErrNoKey)
	for _, minibatch := range []int{-1, 3} {
		_, err = db.Accumulate("acc", minibatch, constant(20, 1))
		wantError(t, err, ErrOutOfRange)
		wantError(t, db.Skip("acc", minibatch), ErrOutOfRange)
	}
	_, err = db.Accumulate("acc", 0, constant(19, 1))
	wantError(t, err, ErrOutOfRange)
	for _, x := range []float32{nan, inf, -inf} {
		g := constant(20, 1)
		g[17] = x
		_, err = db.Accumulate("acc", 1, g)
		wantError(t, err, ErrNotFinite)
		if !strings.Contains(err.Error(), "minibatch 1") || !strings.Contains(err.Error(), "index 17") {
			t.Errorf("it does not name minibatch and index: %v", err)
		}
	}
	_, err = db.Average("average", "acc")
	wantError(t, err, ErrIncomplete)
	if !strings.Contains(err.Error(), "0, 1, 2 of 3") {
		t.Errorf("it does not name what is missing: %v", err)
	}
	for i, want := range []Status{Counted, Counted, Counted} { // the refused one can be sent again
		if s, err := db.Accumulate("acc", i, constant(20, 1)); err != nil || s != want {
			t.Fatalf("minibatch %d: %v, %v", i, s, err)
		}
	}
	if err := db.Skip("acc", 1); err != nil {
		t.Fatal(err)
	}
	if n, err := db.Average("average", "acc"); err != nil || n != 3 {
		t.Fatalf("skipping what arrived: %d, %v", n, err)
	}
	// Sums that overflow are named, and change nothing.
	version := db.Stats().LastVersion
	db.Accumulator("acc", 2, 2, 0)
	db.Accumulate("acc", 0, []float32{0, math.MaxFloat32})
	db.Accumulate("acc", 1, []float32{0, math.MaxFloat32})
	_, err = db.Average("average", "acc")
	wantError(t, err, ErrNotFinite)
	set(t, db, "x", []float32{0, math.MaxFloat32})
	wantError(t, db.Mean("average", []string{"x", "x"}, nil), ErrNotFinite)
	if get(t, db, "average")[0] != 1 || db.Stats().LastVersion != version+1 {
		t.Error("a refused average changed something")
	}
	set(t, db, "y", []float32{1})
	wantError(t, db.Mean("average", []string{"x", "y"}, nil), ErrWrongType)
	wantError(t, db.Mean("average", nil, nil), ErrOutOfRange)
	wantError(t, db.Mean("average", []string{"none"}, nil), ErrNoKey)
}

// TestAccumulateConcurrently pushes every gradient from several goroutines at
// once: each is counted once and the bits are those of the order.
func TestAccumulateConcurrently(t *testing.T) {
	db := open(t, Config{})
	const n, minibatches = 3000, 16
	rng := newRand(t)
	gradients := make([][]float32, minibatches)
	var keys []string
	for i := range gradients {
		gradients[i] = numbers(n, func(int) float32 { return rng.Float32() })
		keys = append(keys, string(rune('a'+i)))
		set(t, db, keys[i], gradients[i])
	}
	db.Mean("mean", keys, nil)
	want, _ := db.Hash("mean")
	for range 20 {
		db.Accumulator("acc", n, minibatches, minibatches)
		var wg sync.WaitGroup
		for w := range 4 {
			order := rand.New(rand.NewPCG(rng.Uint64(), uint64(w))).Perm(minibatches)
			wg.Go(func() {
				for _, i := range order {
					if _, err := db.Accumulate("acc", i, gradients[i]); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if counted, err := db.Average("average", "acc"); err != nil || counted != minibatches {
			t.Fatal(counted, err)
		}
		if got, _ := db.Hash("average"); got != want {
			t.Fatal("the bits depend on the order of arrival")
		}
	}
}

func TestUpdate(t *testing.T) {
	adam := optim.Config{Name: "adam", LR: 0.01}
	rng := newRand(t)
	const n = 100
	db := open(t, Config{})
	params, state := numbers(n, func(int) float32 { return rng.Float32() }), make([]float32, 2*n)
	set(t, db, "p", params)
	for step := uint64(1); step <= 5; step++ {
		grad := numbers(n, func(int) float32 { return rng.Float32() - 0.5 })
		set(t, db, "g", grad)
		adam.Step(params, state, params, state, grad, step)
		for i, want := range []bool{true, false, false} {
			if applied, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, step, adam); err != nil || applied != want {
				t.Fatalf("step %d, try %d: %v, %v", step, i, applied, err)
			}
		}
		for _, wrong := range []uint64{0, step - 1, step + 2, math.MaxUint64} {
			if wrong == step {
				continue
			}
			_, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, wrong, adam)
			wantError(t, err, ErrOutOfRange)
		}
		if !slices.Equal(get(t, db, "p"), params) || !slices.Equal(get(t, db, "s"), state) {
			t.Fatalf("step %d differs from optim", step)
		}
	}
	// A copy carries the step; going back means copying both back.
	db.Copy("p2", "p")
	db.Copy("s2", "s")
	if applied, err := db.Update(UpdateKeys{Params: "p2", State: "s2", Gradient: "g"}, 5, adam); err != nil || applied {
		t.Fatalf("a copy forgot its step: %v, %v", applied, err)
	}
	if applied, err := db.Update(UpdateKeys{Params: "p2", State: "s2", Gradient: "g"}, 6, adam); err != nil || !applied {
		t.Fatalf("a copy does not go on: %v, %v", applied, err)
	}

	before := db.Stats().LastVersion
	_, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, 6, optim.Config{Name: "sgd", LR: 1})
	wantError(t, err, ErrWrongType)
	_, err = db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, 6, optim.Config{Name: "sgd"})
	wantError(t, err, ErrOutOfRange)
	_, err = db.Update(UpdateKeys{Params: "p", State: "none", Gradient: "absent"}, 1, adam)
	wantError(t, err, ErrNoKey)
	_, err = db.Update(UpdateKeys{Params: "p", State: "p", Gradient: "g"}, 1, adam)
	wantError(t, err, ErrOutOfRange)
	if db.Stats().LastVersion != before {
		t.Error("a refused update changed something")
	}
	set(t, db, "short", constant(n-1, 1))
	_, err = db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "short"}, 6, adam)
	wantError(t, err, ErrWrongType)
}

// TestUpdateOnce asks for one step from many goroutines: one applies it.
func TestUpdateOnce(t *testing.T) {
	db := open(t, Config{})
	set(t, db, "p", constant(2000, 0))
	set(t, db, "g", constant(2000, 1))
	for step := uint64(1); step <= 20; step++ {
		var wg sync.WaitGroup
		var mu sync.Mutex
		count := 0
		for range 4 {
			wg.Go(func() {
				applied, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "g"}, step, optim.Config{Name: "sgd", LR: 1})
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				if applied {
					count++
				}
			})
		}
		wg.Wait()
		if count != 1 || get(t, db, "p")[0] != -float32(step) {
			t.Fatalf("step %d was applied %d times: %v", step, count, get(t, db, "p")[0])
		}
	}
}

// TestRoundsMakeNoGarbage runs rounds as a peer does: after the first few, no
// large memory is allocated.
func TestRoundsMakeNoGarbage(t *testing.T) {
	db := open(t, Config{})
	const n = 1 << 18
	g := constant(n, 1)
	set(t, db, "p", constant(n, 0))
	step := uint64(0)
	round := func() {
		step++
		db.Accumulator("acc", n, 2, 1)
		db.Accumulate("acc", 1, g)
		db.Accumulate("acc", 0, g)
		db.Average("average", "acc")
		if _, err := db.Update(UpdateKeys{Params: "p", State: "s", Gradient: "average"}, step, optim.Config{Name: "adam", LR: 1}); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		round()
	}
	const rounds = 20
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range rounds {
		round()
	}
	runtime.ReadMemStats(&after)
	if perRound := (after.TotalAlloc - before.TotalAlloc) / rounds; perRound > 64<<10 {
		t.Errorf("a round over vectors of %d bytes allocates %d bytes", 4*n, perRound)
	}
}
