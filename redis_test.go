//go:build integration

package spirt

import (
	"strings"
	"testing"

	"github.com/spirt-ml/spirt/internal/redistest"
)

// A peer trains on a Redis server, with the module or without it, and ends with
// the model that it has in its own database. Functions see its keys alone.
func TestRedisDatabase(t *testing.T) {
	_, want := modelWith(t, runOf(t, smallJob(9)), "")
	for name, s := range map[string]*redistest.Server{
		"with the module": redistest.WithModule(t, "--requirepass", "sesame"), "stock": redistest.Start(t, "--requirepass", "sesame"),
	} {
		dir := runOf(t, smallJob(9))
		rounds, got := modelWith(t, dir, "redis://:sesame@"+s.Address)
		if got != want || len(rounds) != 9 {
			t.Errorf("%s: %d rounds end with the model %s, in the peer's own database with %s", name, len(rounds), got, want)
		}
		told := ""
		for _, e := range eventsOf(t, dir) {
			if e.Event == "warning" {
				told += e.Message
			}
		}
		if stock := name == "stock"; strings.Contains(told, "no tensor commands") != stock || strings.Contains(told, "users") {
			t.Errorf("%s: the warnings are %q", name, told)
		}
		job := smallJob(9)
		job.Functions.Kind = functionsDatabase
		cfg := alone(runOf(t, job))
		cfg.Database = "redis://:sesame@" + s.Address
		if name == "stock" {
			refused(t, RunPeer(t.Context(), cfg), "no tensor commands")
		} else if _, got := modelWith(t, cfg.Run, cfg.Database); got != want {
			t.Errorf("where the server computes the model is %s, with functions %s", got, want)
		}
		if strings.Contains(s.Log(), "failed badly") {
			t.Error(s.Log())
		}
	}
}
