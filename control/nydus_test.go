package control

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/sluicefs/sluice/control/api"
)

// kataClient does what Kata's NydusClient does (src/runtime/virtcontainers/nydusd.go): the same requests, and the same look at
// the answers.
type kataClient struct{ http *http.Client }

type kataDaemonInfo struct {
	ID      string `json:"id"`
	Version struct {
		PackageVer string `json:"package_ver"`
		GitCommit  string `json:"git_commit"`
		BuildTime  string `json:"build_time"`
		Profile    string `json:"profile"`
		Rustc      string `json:"rustc"`
	} `json:"version"`
	State string `json:"state"`
}

func (c kataClient) checkStatus() (info kataDaemonInfo, err error) {
	resp, err := c.http.Get("http://unix/api/v1/daemon")
	if err != nil {
		return info, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return info, err
	}
	return info, json.Unmarshal(text, &info)
}

func (c kataClient) mount(mountpoint, fsType, source, config string) error {
	body := fmt.Sprintf(`{"fs_type":%q,"source":%q,"config":%q}`, fsType, source, config)
	resp, err := c.http.Post("http://unix/api/v1/mount?mountpoint="+mountpoint, "application/json", bytes.NewBufferString(body))
	return kataResult(resp, err)
}

func (c kataClient) umount(mountpoint string) error {
	req, err := http.NewRequest(http.MethodDelete, "http://unix/api/v1/mount?mountpoint="+mountpoint, nil)
	if err != nil {
		return err
	}
	return kataResult(c.http.Do(req))
}

func kataResult(resp *http.Response, err error) error {
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNoContent {
		return nil
	}
	var e struct{ Code, Message string }
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &e); err != nil {
		return err
	}
	return errors.New(e.Message)
}

func TestKataNydusClient(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("kataShared")
	kata := kataClient{r.client}

	info, err := kata.checkStatus()
	if err != nil || info.ID != "test" || info.State != "RUNNING" || info.Version.PackageVer != "0.0.0-test" {
		t.Errorf("status is %+v, %v", info, err)
	}
	if err := kata.mount("/containers", "passthrough_fs", "/run/kata-containers/shared/sandboxes/1/mounts", ""); err != nil {
		t.Fatal(err)
	}
	if err := kata.mount("/containers", "passthrough_fs", "/srv", ""); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second mount: %v", err)
	}
	grafts, err := r.daemon.Grafts(t.Context(), "kataShared")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(grafts, func(g api.Graft) bool { return g.Path == "/containers" })
	if i < 0 || grafts[i].Source != "/run/kata-containers/shared/sandboxes/1/mounts" || grafts[i].Backend != "passthrough" {
		t.Errorf("grafts are %+v", grafts)
	}
	err = kata.mount("/rafs/1a2b/lowerdir", "rafs", "/var/lib/bootstrap", `{"device":{}}`)
	if err == nil || !strings.Contains(err.Error(), "rafs") || !strings.Contains(err.Error(), "passthrough_fs") {
		t.Errorf("a mount of rafs: %v", err)
	}
	if err := kata.umount("/containers"); err != nil {
		t.Error(err)
	}
	if err := kata.umount("/containers"); err == nil || !strings.Contains(err.Error(), "no graft at /containers") {
		t.Errorf("a second umount: %v", err)
	}
}

// TestKataRequestsVerbatim replays what Kata's client has on the wire, byte by byte (Go's net/http, "unix" as the host).
func TestKataRequestsVerbatim(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("kataShared")
	c, err := net.Dial("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := bufio.NewReader(c)
	for _, tt := range []struct {
		request string
		status  int
	}{
		{"GET /api/v1/daemon HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n", 200},
		{
			"POST /api/v1/mount?mountpoint=/containers HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 97\r\n" +
				"Content-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n" +
				`{"fs_type":"passthrough_fs","source":"/run/kata-containers/shared/sandboxes/1/mounts","config":""}`[:97], 400,
		},
		{
			"POST /api/v1/mount?mountpoint=/containers HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 98\r\n" +
				"Content-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n" +
				`{"fs_type":"passthrough_fs","source":"/run/kata-containers/shared/sandboxes/1/mounts","config":""}`, 204,
		},
		{"DELETE /api/v1/mount?mountpoint=/containers HTTP/1.1\r\nHost: unix\r\nUser-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n", 204},
	} {
		fmt.Fprint(c, tt.request)
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatalf("%q: %v", tt.request, err)
		}
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != tt.status {
			t.Errorf("%q: %d %s, %v", tt.request, resp.StatusCode, text, err)
		}
	}
}

func TestNydusRemount(t *testing.T) {
	r := newRig(t, nil)
	r.addShare("a", api.GraftSpec{Path: "/x", Source: "/srv/1", ReadOnly: true})
	r.expect("PUT", "/api/v1/mount?mountpoint=/x/", `{"fs_type":"passthrough_fs","source":"/srv/2"}`, 204, nil)
	grafts, err := r.daemon.Grafts(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if g := grafts[1]; g.Path != "/x" || g.Source != "/srv/2" || !g.ReadOnly {
		t.Errorf("after a remount the graft is %+v", g)
	}
	r.expect("PUT", "/api/v1/mount?mountpoint=/y", `{"fs_type":"passthrough_fs","source":"/srv/2"}`, 404, nil)
}

func TestNydusTarget(t *testing.T) {
	const body = `{"fs_type":"passthrough_fs","source":"/srv","prefetch_files":"x"}`
	r := newRig(t, nil)
	r.expect("POST", "/api/v1/mount?mountpoint=/x", body, 404, nil) // no share
	r.addShare("a")
	r.expect("POST", "/api/v1/mount?mountpoint=/x&what=ever", body, 204, nil)
	r.addShare("b")
	r.expect("POST", "/api/v1/mount?mountpoint=/x", body, 400, nil) // which?
	r.expect("POST", "/api/v1/mount?mountpoint=/x&tag=b", body, 204, nil)
	r.expect("POST", "/api/v1/mount?mountpoint=/x&tag=c", body, 404, nil)
	for _, q := range []string{"?", "?mountpoint=", "?mountpoint=x", "?mountpoint=/%00"} {
		var e map[string]string // nydusd's errors have two fields
		r.expect("POST", "/api/v1/mount"+q+"&tag=b", body, 400, &e)
		if len(e) != 2 || e["code"] == "" || e["message"] == "" {
			t.Errorf("%s: %v", q, e)
		}
	}
	r.expect("POST", "/api/v1/mount?mountpoint=/y&tag=b", `{"fs_type":"ext4","source":"/srv"}`, 400, nil)
	r.expect("POST", "/api/v1/mount?mountpoint=/y&tag=b", `{"fs_type":"passthrough_fs"}`, 400, nil)
	r.expect("POST", "/api/v1/mount?mountpoint=/y&tag=b", ``, 400, nil)

	r = newRig(t, func(cfg *Config, _ *limits) { cfg.NydusShare = "b" })
	r.addShare("a")
	r.addShare("b")
	r.expect("POST", "/api/v1/mount?mountpoint=/x", body, 204, nil)
	if calls := r.daemon.Calls(); !slices.Contains(calls, "AddGraft b /x") {
		t.Errorf("the daemon was called with %q", calls)
	}
}
