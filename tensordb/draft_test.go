package tensordb

import (
	"errors"
	"testing"

	"github.com/spirt-ml/spirt/tensor"
)

func TestDraft(t *testing.T) {
	db, err := Open(Config{MaxMemory: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	d, err := db.Draft(tensor.Float32, 2, 3)
	if err != nil {
		t.Fatal(err)
	}
	copy(tensor.Floats(d.Data()), []float32{1, 2, 3, 4, 5, 6})
	if db.Exists("k") {
		t.Fatal("a draft can be read")
	}
	version, err := d.Commit("k")
	if err != nil {
		t.Fatal(err)
	}
	d.Discard() // does nothing now
	ref, err := db.Get("k")
	if err != nil {
		t.Fatal(err)
	}
	defer ref.Release()
	if got := ref.Tensor(); ref.Version() != version || got.Shape[1] != 3 || tensor.Floats(got.Data)[5] != 6 {
		t.Errorf("version %d, %v", ref.Version(), got)
	}

	before := db.Stats()
	d, err = db.Draft(tensor.Uint8, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Commit(""); err == nil {
		t.Error("an empty key was accepted")
	}
	if after := db.Stats(); after.MemoryUsed != before.MemoryUsed {
		t.Errorf("%d bytes in use, %d before the refused draft", after.MemoryUsed, before.MemoryUsed)
	}
	if _, err := db.Draft(tensor.Float32, 1<<20); !errors.Is(err, ErrMemory) {
		t.Errorf("error %v, want ErrMemory", err)
	}
	if _, err := db.Draft(tensor.Float32, -1); !errors.Is(err, ErrWrongType) {
		t.Errorf("error %v, want ErrWrongType", err)
	}
}
