package treehash

import (
	"math/rand/v2"
	"testing"
)

func body(n int) []byte {
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{1})
	rng.Read(b)
	return b
}

func TestSumDependsOnEveryChunkSizeAndOrder(t *testing.T) {
	seen := map[Hash]int{}
	for _, n := range []int{0, 1, 2, ChunkSize - 1, ChunkSize, ChunkSize + 1, 3*ChunkSize + 7} {
		h := Sum(body(n))
		if m, ok := seen[h]; ok {
			t.Fatalf("sizes %d and %d have one hash", m, n)
		}
		seen[h] = n
	}
	b := body(2 * ChunkSize)
	swapped := append(append([]byte{}, b[ChunkSize:]...), b[:ChunkSize]...)
	if Sum(b) == Sum(swapped) {
		t.Fatal("the order of chunks does not count")
	}
	flipped := append([]byte{}, b...)
	flipped[len(b)-1] ^= 1
	if Sum(b) == Sum(flipped) {
		t.Fatal("the last byte does not count")
	}
}

// A leaf list is not the body of another tree: the domains differ.
func TestLeavesAreNotABody(t *testing.T) {
	b := body(2*ChunkSize + 5)
	leaves := Leaves(b)
	if len(leaves) != NumChunks(int64(len(b))) {
		t.Fatalf("%d leaves, want %d", len(leaves), NumChunks(int64(len(b))))
	}
	if Root(int64(len(b)), leaves) != Sum(b) {
		t.Fatal("Root of the leaves is not Sum")
	}
	if Root(int64(len(b))-1, leaves) == Sum(b) {
		t.Fatal("the size does not count")
	}
}

func TestGolden(t *testing.T) {
	for _, c := range []struct {
		n    int
		want string
	}{
		{0, "9b779f74b305adc3ec513485085d52e95f9ce4fbaf9e56cb02d38a07e19353df"},
		{3, "733a18674e4b7e81c68c5c7272a931f03d474d33d2f3c10057fa56b13c1d3b80"},
		{ChunkSize + 1, "c9e834ccab7e0995e1c3036a369f8183156c1d8569056ad8832d8da4ce0339b9"},
	} {
		got := Sum(body(c.n)).String()
		if got != c.want {
			t.Errorf("Sum of %d bytes = %s, want %s", c.n, got, c.want)
		}
	}
}

func TestText(t *testing.T) {
	h := Sum([]byte("abc"))
	text, _ := h.MarshalText()
	var back Hash
	if err := back.UnmarshalText(text); err != nil || back != h {
		t.Fatalf("round trip: %v, %v", back, err)
	}
	if back.UnmarshalText(text[:10]) == nil || back.UnmarshalText(append([]byte("zz"), text[2:]...)) == nil {
		t.Fatal("bad text accepted")
	}
}

func BenchmarkSum(b *testing.B) {
	data := body(45 << 20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		Sum(data)
	}
}
