package tensordb

import (
	"math"
	"slices"
	"testing"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/tensor"
)

func TestMeanWeights(t *testing.T) {
	db := open(t, Config{})
	rng := newRand(t)
	const n = 5003
	for _, peers := range []int{1, 2, 9, 20} {
		var keys []string
		var weights, equal []uint32
		want := make([]float32, n)
		var total float32
		for i := range peers {
			keys = append(keys, string(rune('a'+i)))
			weights, equal = append(weights, uint32(1+rng.IntN(100))), append(equal, 3)
			f := numbers(n, func(int) float32 { return float32(rng.NormFloat64()) })
			set(t, db, keys[i], f)
			total += float32(weights[i])
			for j, v := range f {
				want[j] += float32(float32(weights[i]) * v)
			}
		}
		weights[0] += 100 // not all alike
		total += 100
		first := get(t, db, keys[0])
		clear(want)
		for i, key := range keys {
			for j, v := range get(t, db, key) {
				if product := float32(float32(weights[i]) * v); i == 0 {
					want[j] = product
				} else {
					want[j] += product
				}
			}
		}
		for j := range want {
			want[j] /= total
		}
		if err := db.Mean("mean", keys, weights); err != nil {
			t.Fatal(err)
		}
		if got := get(t, db, "mean"); peers > 1 && !slices.Equal(got, want) || peers == 1 && !slices.Equal(got, first) {
			t.Errorf("%d tensors: another mean than by hand", peers)
		}
		// Equal weights change nothing, not even a bit.
		if err := db.Mean("equal", keys, equal); err != nil {
			t.Fatal(err)
		}
		if err := db.Mean("plain", keys, nil); err != nil {
			t.Fatal(err)
		}
		a, _ := db.Hash("equal")
		b, _ := db.Hash("plain")
		if a != b {
			t.Errorf("%d tensors: equal weights give other bits than none", peers)
		}
	}
	wantError(t, db.Mean("mean", []string{"a", "b"}, []uint32{1}), ErrOutOfRange)
	wantError(t, db.Mean("mean", []string{"a"}, []uint32{}), ErrOutOfRange)
	wantError(t, db.Mean("mean", []string{"a", "b"}, []uint32{1, 0}), ErrOutOfRange)
	wantError(t, db.Mean("mean", []string{"a", "b"}, []uint32{1, maxWeight + 1}), ErrOutOfRange)
}

func TestHalf(t *testing.T) {
	db := open(t, Config{})
	set(t, db, "f", []float32{1, -0.1, 65519, 1e-9, 6e-8})
	if err := db.Half("h", "f"); err != nil {
		t.Fatal(err)
	}
	ref, err := db.Get("h")
	if err != nil {
		t.Fatal(err)
	}
	x := ref.Tensor()
	ref.Release()
	if want := []uint16{0x3c00, 0xae66, 0x7bff, 0, 1}; x.DType != tensor.Float16 || x.Validate() != nil || !slices.Equal(tensor.Halves(x.Data), want) {
		t.Fatalf("%v %v: %04x, want %04x", x.DType, x.Shape, tensor.Halves(x.Data), want)
	}
	// The mean of halves is that of the numbers they stand for.
	keys, decoded, weights := []string{"h"}, []string{"decoded"}, []uint32{2}
	d := make([]float32, 5)
	kernel.DecodeHalf(d, tensor.Halves(x.Data))
	set(t, db, "decoded", d)
	for range 2 {
		if err := db.Mean("mean", keys, nil); err != nil {
			t.Fatal(err)
		}
		if err := db.Mean("weighted", keys, weights); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"mean", "weighted"} {
			w := weights
			if key == "mean" {
				w = nil
			}
			if err := db.Mean("want", decoded, w); err != nil {
				t.Fatal(err)
			}
			a, _ := db.Hash(key)
			b, _ := db.Hash("want")
			if a != b {
				t.Errorf("the %s of %d halves is %v, of what they stand for %v", key, len(keys), get(t, db, key), get(t, db, "want"))
			}
		}
		if err := db.Half("again", "mean"); err != nil {
			t.Fatal(err)
		}
		d := make([]float32, 5)
		ref, _ := db.Get("again")
		kernel.DecodeHalf(d, tensor.Halves(ref.Tensor().Data))
		ref.Release()
		set(t, db, "decoded again", d)
		keys, decoded, weights = append(keys, "again"), append(decoded, "decoded again"), append(weights, 5)
	}

	wantError(t, db.Mean("mean", []string{"h", "f"}, nil), ErrWrongType)
	wantError(t, db.Half("x", "h"), ErrWrongType)
	wantError(t, db.Half("x", "none"), ErrNoKey)
	wantError(t, db.Half("", "f"), ErrOutOfRange)
	for _, v := range []float32{65520, -1e9, float32(math.Inf(1))} {
		set(t, db, "f", []float32{1, 2, v})
		wantError(t, db.Half("x", "f"), ErrOutOfRange)
	}
	used := db.Stats().MemoryUsed
	if err := db.Half("f", "f"); err == nil || db.Stats().MemoryUsed != used || db.Exists("x") {
		t.Errorf("a refused conversion (%v) changed something", err)
	}
}

// Keys in pairs with something else are held to the token's prefix too.
func TestPairsKeepToThePrefix(t *testing.T) {
	try := func(args ...string) error {
		c := &conn{token: &Token{Prefix: testPrefix, Access: All}}
		for _, a := range args {
			c.args = append(c.args, []byte(a))
		}
		_, cmd := FindCommand(c.args[0])
		return cmd.Keys(c.args[1:], c.checkKey)
	}
	own, foreign := testPrefix+"p", "{job:1}:p"
	if err := try("TENSOR.WMEAN", own, "1", own, "2", own); err != nil {
		t.Error(err)
	}
	for _, args := range [][]string{{foreign, "1", own}, {own, "1", foreign}, {own, "1", own, "1", foreign}} {
		if err := try(append([]string{"TENSOR.WMEAN"}, args...)...); err == nil {
			t.Errorf("%q is allowed", args)
		}
	}
}
