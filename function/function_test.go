package function

import (
	"testing"
)

func TestWarmReuse(t *testing.T) {
	p := platform(t, Config{Concurrency: 2})
	body, first, err := p.Invoke(t.Context(), event(t, order{Do: "echo", Value: "a"}))
	if err != nil {
		t.Fatal(err)
	}
	a := read(t, body)
	if a.Value != "a" || !first.Cold || first.Init <= 0 || first.Instance != a.PID {
		t.Fatalf("cold: %+v, %+v", a, first)
	}
	t.Logf("%+v", first)
	for range 3 {
		body, inv, err := p.Invoke(t.Context(), event(t, order{Do: "echo", Value: "b"}))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v", inv)
		b := read(t, body)
		_ = b
	}
}
