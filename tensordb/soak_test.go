package tensordb

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

var (
	soakSeed  = flag.Uint64("soakseed", 0, "the one seed of the soak; 0: several")
	soakSteps = flag.Int("soaksteps", 1500, "commands for each seed of the soak")
)

// modelTensor is a float32 tensor as the model has it; a cast one is int32.
type modelTensor struct {
	data     []float32
	whole    bool // int32
	gradient bool
	step     uint64
	expires  time.Time
}

// soak is a database, its disk, and what both should hold.
type soak struct {
	t       *testing.T
	rng     *rand.Rand
	config  Config
	disk    *crashFiles
	db      *DB
	model   map[string]*modelTensor
	saved   map[string]*modelTensor // as of the last acknowledged checkpoint; nil: none
	version uint64                  // the highest seen
	history []string                // the last commands
	counts  map[string]int
}

var soakKeys = []string{"a", "b", "c", "d", "e", "f", "g", "h"}

// TestSoak runs random commands against a model in plain Go, with crashes
// that fall back to the last checkpoint, without a limit of memory, with one
// that refuses, and with one that drops gradients.
func TestSoak(t *testing.T) {
	seeds := []uint64{1, 2, 3, uint64(time.Now().UnixNano())}
	if *soakSeed != 0 {
		seeds = []uint64{*soakSeed}
	}
	for _, seed := range seeds {
		for _, config := range []Config{{}, {MaxMemory: 7 * (overhead + 160)}, {MaxMemory: 7 * (overhead + 160), DropGradients: true}} {
			t.Run(fmt.Sprintf("%d/%d/%v", seed, config.MaxMemory, config.DropGradients), func(t *testing.T) {
				s := &soak{
					t: t, rng: rand.New(rand.NewPCG(seed, 1)), config: config,
					model: map[string]*modelTensor{}, counts: map[string]int{},
				}
				s.disk = newCrashFiles(s.rng)
				s.open()
				for range *soakSteps {
					s.command()
				}
				s.db.Close()
				t.Log(s.counts)
			})
		}
	}
}

func (s *soak) open() {
	s.config.Dir = "dir"
	db, err := openOn(s.disk, Config{MaxMemory: s.config.MaxMemory, DropGradients: s.config.DropGradients})
	if err != nil {
		s.t.Fatal(err)
	}
	db.config.Dir = "dir" // in s.disk
	s.db = db
}

func (s *soak) fail(format string, args ...any) {
	s.t.Helper()
	s.t.Fatalf("%s\nafter %q", fmt.Sprintf(format, args...), s.history)
}

func (s *soak) key() string { return soakKeys[s.rng.IntN(len(soakKeys))] }

// command runs one command on both.
func (s *soak) command() {
	names := []string{"set", "set", "copy", "rename", "delete", "kind", "mean", "sum", "median", "trimmed", "scale", "axpy", "slice", "cast", "average", "update", "update", "expire", "persist", "quantise", "save", "save", "crash"}
	name := names[s.rng.IntN(len(names))]
	dst, x, y, z := s.key(), s.key(), s.key(), s.key()
	s.history = append(s.history, fmt.Sprint(name, " ", dst, " ", x, " ", y, " ", z))
	s.history = s.history[max(0, len(s.history)-12):]
	m := s.model
	a, b, c := m[x], m[y], m[z]
	var want error             // that the model expects
	next := maps.Clone(m)      // the model after the command
	result := &modelTensor{}   // of a command that stores one under dst
	store := func(do func()) { // what it stores, unless there is an error
		if want == nil {
			do()
			next[dst] = result
		}
	}
	exist := func(list ...*modelTensor) {
		if want == nil && slices.Contains(list, nil) {
			want = ErrNoKey
		}
	}
	floats := func(list ...*modelTensor) {
		for _, l := range list {
			if want == nil && (l.whole || len(l.data) != len(list[0].data)) {
				want = ErrWrongType
			}
		}
	}
	each := func(f func(i int) float32) {
		result.data = make([]float32, len(a.data))
		for i := range result.data {
			result.data[i] = f(i)
		}
	}
	var got error
	switch name {
	case "set":
		result.data = numbers([]int{8, 8, 8, 20}[s.rng.IntN(4)], func(int) float32 { return float32(s.rng.IntN(33) - 16) })
		next[dst] = result
		var v uint64
		v, got = s.db.Set(dst, tensor.FromFloats([]int{len(result.data)}, result.data))
		if got == nil && v <= s.version {
			s.fail("version %d comes after %d", v, s.version)
		}
		s.version = max(s.version, v)
	case "copy":
		exist(a)
		store(func() { *result = *a; result.expires = time.Time{} })
		got = s.db.Copy(dst, x)
	case "rename":
		exist(a)
		store(func() { delete(next, x); result = a })
		got = s.db.Rename(dst, x)
	case "delete":
		n := 0
		for _, k := range []string{x, y} {
			if next[k] != nil {
				n++
			}
			delete(next, k)
		}
		if d := s.db.Delete(x, y); d != n {
			s.fail("%d were deleted, not %d", d, n)
		}
	case "kind":
		dst = x
		exist(a)
		store(func() { *result = *a; result.gradient = true })
		got = s.db.SetGradient(x, true)
	case "mean", "sum":
		exist(a, b)
		if want == nil && a.whole {
			want = ErrWrongType
		}
		if want == nil {
			floats(a, b)
		}
		store(func() {
			each(func(i int) float32 {
				if name == "sum" {
					return a.data[i] + b.data[i]
				}
				return (a.data[i] + b.data[i]) / 2
			})
			result.gradient = a.gradient && b.gradient
		})
		if name == "sum" {
			got = s.db.Sum(dst, []string{x, y})
		} else {
			got = s.db.Mean(dst, []string{x, y}, nil)
		}
	case "median", "trimmed": // of three they are the same
		exist(a, b, c)
		if want == nil {
			floats(a, b, c)
		}
		store(func() {
			each(func(i int) float32 {
				return slices.Sorted(slices.Values([]float32{a.data[i], b.data[i], c.data[i]}))[1]
			})
			result.gradient = a.gradient && b.gradient && c.gradient
		})
		if name == "median" {
			got = s.db.Median(dst, []string{x, y, z})
		} else {
			got = s.db.TrimmedMean(dst, []string{x, y, z}, 1)
		}
	case "scale":
		exist(a)
		if want == nil {
			floats(a)
		}
		alpha := []float32{0.5, -1}[s.rng.IntN(2)]
		store(func() { each(func(i int) float32 { return alpha * a.data[i] }); result.gradient = a.gradient })
		got = s.db.Scale(dst, alpha, x)
	case "axpy":
		exist(a, b)
		if want == nil {
			floats(a, b)
		}
		store(func() {
			each(func(i int) float32 { return b.data[i] + float32(-1*a.data[i]) })
			result.gradient = a.gradient && b.gradient
		})
		got = s.db.Axpy(dst, -1, x, y)
	case "slice":
		from, to := s.rng.IntN(8), s.rng.IntN(12)
		exist(a)
		if want == nil && (to < from || to > len(a.data)) {
			want = ErrOutOfRange
		}
		store(func() { result.data, result.whole, result.gradient = a.data[from:to], a.whole, a.gradient })
		got = s.db.Slice(dst, x, from, to)
	case "cast":
		exist(a)
		whole := s.rng.IntN(2) == 0
		store(func() {
			result.whole, result.gradient = whole, a.gradient
			each(func(i int) float32 {
				if whole {
					return float32(int32(a.data[i]))
				}
				return a.data[i]
			})
		})
		dtype := tensor.Float32
		if whole {
			dtype = tensor.Int32
		}
		got = s.db.Cast(dst, x, dtype)
	case "average":
		got = s.average(dst, result)
		next[dst] = result
	case "update":
		s.update(dst, x, y, next, &want, &got)
	case "expire":
		at := time.Now().Add(time.Hour + time.Duration(s.rng.IntN(1e9))*time.Microsecond)
		if ok := s.db.Expire(x, at); ok != (a != nil) {
			s.fail("Expire: %v", ok)
		}
		if a != nil {
			e := *a
			e.expires, next[x] = at, &e
		}
	case "persist":
		s.db.Expire(x, time.Time{})
		if a != nil {
			e := *a
			e.expires, next[x] = time.Time{}, &e
		}
	case "quantise": // and back: what is small and whole comes out as it was, about
		if a != nil && !a.whole && len(a.data) > 0 {
			got = s.db.Quantise("quantised", x)
			if got == nil {
				got = s.db.Dequantise("back", "quantised", []int{len(a.data)})
			}
			if got == nil {
				top := float32(0)
				for _, v := range a.data {
					top = max(top, v, -v)
				}
				for i, v := range get(s.t, s.db, "back") {
					if d := v - a.data[i]; d > top/250 || d < -top/250 {
						s.fail("%v became %v", a.data[i], v)
					}
				}
			}
			s.db.Delete("quantised", "back")
		}
	case "save", "crash":
		s.save(name == "crash")
		return
	}
	outcome := "ok"
	switch {
	case errors.Is(got, ErrMemory) && s.config.MaxMemory > 0:
		outcome = "OOM" // nothing has changed
		next = m
		if s.config.DropGradients {
			for _, key := range s.db.Keys("") {
				if meta, err := s.db.Stat(key); err == nil && meta.Gradient {
					s.fail("out of memory, but the gradient %q is there: %v", key, got)
				}
			}
		}
	case !errors.Is(got, want) || want == nil && got != nil:
		s.fail("error %v, want %v", got, want)
	case want != nil:
		outcome = "refused"
		next = m
	}
	s.counts[name+" "+outcome]++
	s.model = next
	s.compare(s.model)
}

// average sums gradients in any order.
func (s *soak) average(dst string, result *modelTensor) error {
	n := 1 + s.rng.IntN(3)
	if err := s.db.Accumulator("sum", 8, n, n); err != nil {
		return err
	}
	defer s.db.Delete("sum")
	sum := make([]float32, 8)
	parts := make([][]float32, n)
	for i := range parts {
		parts[i] = numbers(8, func(j int) float32 { return float32(s.rng.IntN(9) - 4) })
		for j, v := range parts[i] {
			sum[j] += v
		}
	}
	for _, i := range s.rng.Perm(n) {
		if _, err := s.db.Accumulate("sum", i, parts[i]); err != nil {
			return err
		}
		if status, err := s.db.Accumulate("sum", i, parts[i]); err != nil || status != Duplicate {
			s.fail("again: %v, %v", status, err)
		}
	}
	result.data, result.gradient = numbers(8, func(i int) float32 { return sum[i] / float32(n) }), true
	_, err := s.db.Average(dst, "sum")
	return err
}

// update applies a step of SGD, twice.
func (s *soak) update(params, state, gradient string, next map[string]*modelTensor, want, got *error) {
	p, st, g := next[params], next[state], next[gradient]
	at := uint64(0)
	if st != nil {
		at = st.step
	}
	switch {
	case params == state || gradient == params || gradient == state:
		*want = ErrOutOfRange
	case p == nil || g == nil:
		*want = ErrNoKey
	case p.whole || g.whole || len(p.data) != len(g.data) || st != nil && (st.whole || len(st.data) != 0):
		*want = ErrWrongType
	default:
		next[params] = &modelTensor{data: numbers(len(p.data), func(i int) float32 { return p.data[i] - float32(0.5*g.data[i]) })}
		next[state] = &modelTensor{step: at + 1}
	}
	sgd := optim.Config{Name: optim.SGD, LR: 0.5}
	keys := UpdateKeys{Params: params, State: state, Gradient: gradient}
	var applied bool
	if applied, *got = s.db.Update(keys, at+1, sgd); *got == nil && !applied {
		s.fail("the step was not applied")
	}
	if *got == nil && s.db.Exists(gradient) {
		if again, err := s.db.Update(keys, at+1, sgd); err != nil || again {
			s.fail("the step was applied again: %v, %v", again, err)
		}
	}
}

// save writes a checkpoint, and where crash, the power fails in the middle of
// it; after that the database has what this or the one before had.
func (s *soak) save(crash bool) {
	kept := map[string]*modelTensor{}
	for key, m := range s.model {
		if !m.gradient {
			kept[key] = m
		}
	}
	s.disk.crashAt = 0
	if crash {
		s.disk.crashAt = s.disk.ops + 1 + s.rng.IntN(24)
	}
	err := s.db.Save("soak")
	s.compare(s.model)
	if err == nil {
		s.saved = kept
	}
	s.counts[fmt.Sprintf("save, crash %v: %v", crash, err)]++
	if !crash {
		if err != nil {
			s.fail("saving: %v", err)
		}
		return
	}
	s.db.Close()
	s.disk = s.disk.reboot()
	s.open()
	s.db.removeTemporary()
	_, recovery := s.db.Recover("soak")
	switch {
	case errors.Is(recovery, ErrNoCheckpoint) && s.saved == nil:
		s.model = map[string]*modelTensor{}
	case recovery != nil:
		s.fail("recovering: %v", recovery)
	case s.saved == nil || len(s.difference(s.saved)) > 0:
		s.model, s.saved = kept, kept // the one that was cut off
	default:
		s.model = s.saved
	}
	s.compare(s.model)
}

// compare checks that the database holds what the model does, gradients that
// were dropped excepted, which it takes out of the model.
func (s *soak) compare(want map[string]*modelTensor) {
	s.t.Helper()
	if s.config.DropGradients {
		for key, m := range want {
			if m.gradient && !s.db.Exists(key) {
				delete(want, key)
				s.counts["dropped"]++
			}
		}
	}
	if d := s.difference(want); d != "" {
		s.fail("%s", d)
	}
	if u := s.db.Stats(); u.MemoryLimit > 0 && u.MemoryUsed+u.MemoryFree > u.MemoryLimit {
		s.fail("%d bytes are in use, %d kept, of %d", u.MemoryUsed, u.MemoryFree, u.MemoryLimit)
	}
}

// difference says how the database differs from the model, if it does.
func (s *soak) difference(want map[string]*modelTensor) string {
	if keys := s.db.Keys(""); !slices.Equal(keys, slices.Sorted(maps.Keys(want))) {
		return fmt.Sprintf("keys %v, want %v", keys, slices.Sorted(maps.Keys(want)))
	}
	for key, w := range want {
		ref, err := s.db.Get(key)
		if err != nil {
			return err.Error()
		}
		meta, data := ref.Meta(), slices.Clone(ref.Tensor().Data)
		ref.Release()
		f := tensor.Floats(data)
		if w.whole {
			f = slices.Clone(f)
			tensor.Convert(tensor.FromFloats([]int{len(f)}, f), tensor.Tensor{DType: tensor.Int32, Shape: []int{len(f)}, Data: data}, 0, len(f))
		}
		at, _ := s.db.Expiry(key)
		if !slices.Equal(f, w.data) || meta.Gradient != w.gradient || meta.Step != w.step || (meta.DType == tensor.Int32) != w.whole || at.IsZero() != w.expires.IsZero() || !at.IsZero() && at.UnixMilli() != w.expires.UnixMilli() {
			return fmt.Sprintf("%q is %v %+v, expires %v, want %+v", key, f, meta, at, *w)
		}
	}
	return ""
}
