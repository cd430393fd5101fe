"""Export over TLS: whom the exporter trusts, and how it proves itself; over http/protobuf and gRPC."""

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from exporting_telemetry import until
from otlp_receiver import Receiver, Tls
from span_samples import config, gateway, identity, record
from tls_material import Authority

from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.runtime.config.declared import Problems
from clrk.runtime.config.exporters import read_environment_files


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture(scope="module")
def clients():
    return Authority("clients")


@pytest.fixture(params=["http/protobuf", "grpc"])
def protocol(request):
    return request.param


def server(tmp_path, authority, client_ca=None):
    certificate, key = authority.issue()
    folder = tmp_path / "server"
    folder.mkdir()
    (folder / "cert.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    return Tls(certificate, key, client_ca, str(folder))


def with_ca(settings, pem):
    return settings.model_copy(update={"upstream_ca_pem": {"default/default": pem.decode()}})


async def failures(telemetry):
    await until(lambda: telemetry.store.counters["export_failures"] >= 2)


async def test_a_gateways_own_roots_are_trusted_beside_the_systems(tmp_path, authority, protocol):
    async with Receiver(protocol, tls=server(tmp_path, authority)) as receiver:
        settings = config([gateway(receiver.endpoint, protocol=protocol)])
        telemetry = Telemetry.open(tmp_path, with_ca(settings, authority.pem))
        record(telemetry, identity(), "trusted")
        await receiver.wait(lambda: receiver.names == ["trusted"])
        await telemetry.close()
        assert receiver.names == ["trusted"]
        assert telemetry.store.counters["export_failures"] == 0


async def test_an_unknown_authority_gets_nothing_until_it_is_configured(tmp_path, authority, protocol):
    async with Receiver(protocol, tls=server(tmp_path, authority)) as receiver:
        settings = config([gateway(receiver.endpoint, protocol=protocol)])
        telemetry = Telemetry.open(tmp_path, with_ca(settings, Authority("another").pem))
        record(telemetry, identity(), "kept back")
        await failures(telemetry)
        assert not receiver.requests
        assert not receiver.refused
        telemetry.reconfigure(with_ca(settings, authority.pem))
        await receiver.wait(lambda: receiver.names == ["kept back"])
        await telemetry.close()


async def test_a_plain_server_behind_an_https_endpoint_gets_nothing(tmp_path, protocol):
    async with Receiver(protocol) as receiver:
        endpoint = receiver.endpoint.replace("http:", "https:")
        telemetry = Telemetry.open(tmp_path, config([gateway(endpoint, protocol=protocol, headers={"a": "s3cret"})]))
        record(telemetry, identity(), "never in clear")
        await failures(telemetry)
        await telemetry.close()
        assert not receiver.requests
        assert not receiver.refused


async def test_a_grpc_endpoint_without_a_scheme_is_encrypted(tmp_path, authority):
    async with Receiver("grpc", tls=server(tmp_path, authority)) as receiver:
        settings = config([gateway(f"localhost:{receiver.port}", protocol="grpc")])
        telemetry = Telemetry.open(tmp_path, with_ca(settings, authority.pem))
        record(telemetry, identity(), "secure by default")
        await receiver.wait(lambda: receiver.spans)
        await telemetry.close()
        assert receiver.names == ["secure by default"]
        assert telemetry.store.counters["export_failures"] == 0


async def test_the_environments_files_reach_the_backend_that_demands_a_certificate(
    tmp_path, authority, clients, protocol
):
    certificate, key = clients.issue("clrk", ExtendedKeyUsageOID.CLIENT_AUTH)
    for name, text in (("ca", authority.pem), ("cert", certificate), ("key", key)):
        (tmp_path / f"{name}.pem").write_bytes(text)
    async with Receiver(protocol, tls=server(tmp_path, authority, clients.pem)) as receiver:
        without = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "ca.pem"),
        }
        whole = without | {
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(tmp_path / "cert.pem"),
            "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(tmp_path / "key.pem"),
        }
        for environment in (without, whole):
            problems = Problems()
            files = read_environment_files(environment, problems)
            assert problems.lines() == ()
            settings = config(environment=environment).model_copy(update={"environment_files": files})
            telemetry = Telemetry.open(tmp_path / "state", settings)
            if environment is without:
                record(telemetry, identity(), "proven")
                await failures(telemetry)
                assert not receiver.requests
            else:
                await receiver.wait(lambda: receiver.names == ["proven"])
            await telemetry.close()
