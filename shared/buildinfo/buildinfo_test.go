package buildinfo

import (
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
)

func TestDescribe(t *testing.T) {
	settings := []debug.BuildSetting{{Key: "vcs.revision", Value: "0123456789abcdef"}, {Key: "vcs.modified", Value: "true"}, {Key: "vcs.time", Value: "2026-01-02T03:04:05Z"}}
	for _, tc := range []struct {
		name, linked string
		build        *debug.BuildInfo
		version      string
		line         string
	}{
		{"release", "v1.2.3", &debug.BuildInfo{Main: debug.Module{Version: "v0.0.0-x"}}, "v1.2.3", "v1.2.3 ("},
		{"built by the Go tool", "", &debug.BuildInfo{Main: debug.Module{Version: "v0.0.0-x"}, Settings: settings}, "v0.0.0-x", "v0.0.0-x (0123456789ab with changes, "},
		{"devel", "", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "devel", "devel ("},
		{"nothing known", "", nil, "devel", "devel (" + runtime.Version() + ", "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			info := describe(tc.linked, tc.build)
			if info.Version != tc.version || !strings.HasPrefix(info.String(), tc.line) {
				t.Errorf("version %q, line %q; want %q, %q…", info.Version, info, tc.version, tc.line)
			}
		})
	}
	if Version() == "" || Get().Go != runtime.Version() {
		t.Error("the running binary is not described")
	}
}
